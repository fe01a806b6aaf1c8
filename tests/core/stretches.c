/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages on their way to or from the file go together with the few that lie between them, which stay
 * what they are. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>

#include "fixture.h"
#include "overwrite.h"
#include "stretch.h"

enum { PAGES = 2048, FIRST = 600, ROOM = 1 << 20, N = 32 };

static struct tm_config config;
static struct tm_device *device;
static unsigned n_reads, n_writes;
static off_t unreadable; /* a block that no read may cover, unless 0 */
static int failing;      /* writes that fail */
static page_set refused; /* no put accepts these */
static void (*in_between)(void);

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    n_reads += fd == config.file_fd;
    if (fd == config.file_fd && unreadable >= offset && unreadable < offset + (off_t)length) {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_pread64, fd, buffer, length, offset);
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    n_writes += fd == config.file_fd;
    if (fd == config.file_fd && failing) {
        failing--;
        errno = EIO;
        return -1;
    }
    return syscall(SYS_pwrite64, fd, buffer, length, offset);
}

int __real_overwrite_run(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_run(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_run(struct tm_device *server, struct overwrite *run)
{
    void (*meanwhile)(void) = in_between;
    in_between = NULL;
    if (meanwhile)
        meanwhile();
    return __real_overwrite_run(server, run);
}

bool __real_page_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean);
bool __wrap_page_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean);
bool __wrap_page_put(struct tm_device *server, uint64_t page, const uint8_t *content, bool clean)
{
    bool is_refused =
        page >= FIRST && page < FIRST + N && refused & page_bit((uint32_t)(page - FIRST));
    return !is_refused && __real_page_put(server, page, content, clean);
}

static uint64_t at(uint32_t i) { return (uint64_t)(FIRST + i) * TM_PAGE; }

/* A page that no put accepts while the pool is frozen, or (zeros) one that each does. */
static void fill(uint8_t *page, uint32_t i, uint8_t version, page_set zeros)
{
    memset(page, zeros & page_bit(i) ? 0 : version + (int)i, TM_PAGE);
    page[1] = page[0] ? version : 0;
}

static int write_all(uint8_t version, page_set zeros)
{
    static uint8_t content[N * TM_PAGE];
    for (uint32_t i = 0; i < N; i++)
        fill(content + (size_t)i * TM_PAGE, i, version, zeros);
    n_writes = 0;
    return tm_write(device, content, sizeof content, at(0), false);
}

static void check_all(uint8_t version, page_set zeros)
{
    static uint8_t content[N * TM_PAGE], expected[TM_PAGE];
    n_reads = 0;
    CHECK(tm_read(device, content, sizeof content, at(0)) == 0);
    for (uint32_t i = 0; i < N; i++) {
        fill(expected, i, version, zeros);
        CHECK(memcmp(content + (size_t)i * TM_PAGE, expected, TM_PAGE) == 0);
    }
}

static void write_one(uint32_t i, uint8_t version)
{
    uint8_t content[TM_PAGE];
    fill(content, i, version, 0);
    CHECK(tm_write(device, content, TM_PAGE, at(i), false) == 0);
}

static enum kind kind_of(uint32_t i) { return word_kind(index_word(device, FIRST + i)); }

/* Bits set far enough apart are stretches of their own. */
static void test_the_set(void)
{
    page_set pages = page_bit(3) | page_bit(4) | page_bit(4 + STRETCH_GAP + 1) | page_bit(63);
    struct stretch first = stretch_first(pages, STRETCH_GAP),
                   last = stretch_first(pages_after(pages, 14), STRETCH_GAP);
    CHECK(first.start == 3 && first.n == STRETCH_GAP + 3 && stretch_has_gaps(pages, first));
    CHECK(last.start == 63 && last.n == 1 && !stretch_has_gaps(pages, last));
    CHECK(pages_after(pages, 64) == 0 && stretch_first(UINT64_MAX, 0).n == 64);
    CHECK(stretch_first(page_bit(0) | page_bit(STRETCH_GAP + 2), STRETCH_GAP).n == 1);
}

static void test_zeros_between_go_along(void)
{
    page_set zeros = page_bit(5) | page_bit(20);
    CHECK(write_all(1, zeros) == 0 && n_writes == 1);
    CHECK(kind_of(5) == TM_NOWHERE && kind_of(6) == TM_FILE); /* the file has these zeros */
    check_all(1, zeros);
    CHECK(n_reads == 1);
}

static void test_far_apart_they_are_two(void)
{
    page_set zeros = pages_all(20) & ~pages_all(20 - STRETCH_GAP - 1);
    CHECK(write_all(2, zeros) == 0 && n_writes == 2);
    CHECK(kind_of(19) == TM_ZERO); /* the file has something else */
    check_all(2, zeros);
    CHECK(n_reads == 2);
}

/* What is in tmem stays there, newer than the file. */
static void test_stored_pages_between_are_not_taken_from_the_file(void)
{
    CHECK(write_all(3, 0) == 0);
    freeze(device, 0);
    write_one(7, 50);
    freeze(device, 1);
    static uint8_t content[N * TM_PAGE], expected[TM_PAGE];
    n_reads = 0;
    CHECK(tm_read(device, content, sizeof content, at(0)) == 0 && n_reads == 1);
    fill(expected, 7, 50, 0);
    CHECK(memcmp(content + 7 * TM_PAGE, expected, TM_PAGE) == 0 && kind_of(7) == TM_TMEM);
    unreadable = (off_t)at(7); /* of no concern to the others, nor to itself */
    CHECK(tm_read(device, content, sizeof content, at(0)) == 0);
    CHECK(memcmp(content + 7 * TM_PAGE, expected, TM_PAGE) == 0);
    unreadable = (off_t)at(8);
    CHECK(tm_read(device, content, sizeof content, at(0)) == EIO);
    unreadable = 0;
}

static void overwrite_the_zeros(void) { write_one(5, 77); }

/* Somebody writes a page after its put, and before the others are spilled. */
static void test_what_has_changed_since_stays_so(void)
{
    uint8_t content[TM_PAGE], expected[TM_PAGE];
    page_set zeros = page_bit(5);
    in_between = overwrite_the_zeros;
    CHECK(write_all(4, zeros) == 0 && n_writes == 3); /* that one, and what lies before and after */
    CHECK(tm_read(device, content, TM_PAGE, at(5)) == 0);
    fill(expected, 5, 77, 0);
    CHECK(memcmp(content, expected, TM_PAGE) == 0);
    write_one(5, 4);
    check_all(4, 0);
}

static void overwrite_twice(void)
{
    uint64_t before = index_word(device, FIRST + 7);
    write_one(7, 78);
    write_one(7, 79);
    CHECK(word_same_content(index_word(device, FIRST + 7), before)); /* for it lies there again */
}

/* The same, until its word is what the put had left. */
static void test_what_has_changed_twice_stays_so(void)
{
    uint8_t content[TM_PAGE], expected[TM_PAGE];
    uint64_t freed;
    freeze(device, 0);
    refused = pages_all(N) & ~page_bit(7);
    in_between = overwrite_twice;
    CHECK(write_all(9, 0) == 0);
    refused = 0;
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &freed) == 0);
    CHECK(tm_read(device, content, TM_PAGE, at(7)) == 0);
    fill(expected, 7, 79, 0);
    CHECK(memcmp(content, expected, TM_PAGE) == 0);
    freeze(device, 1);
}

/* What was put before a spill that fails stays as it is. */
static void test_a_failed_spill(void)
{
    uint8_t content[TM_PAGE];
    CHECK(write_all(5, 0) == 0);
    failing = 1;
    CHECK(write_all(6, page_bit(9)) == EIO);
    CHECK(kind_of(9) == TM_ZERO && tm_read(device, content, TM_PAGE, at(9)) == 0 && !content[0]);
    check_all(5, page_bit(9)); /* the write had touched nothing */
    CHECK(tm_drain(device) == 0);
    check_all(5, page_bit(9));
}

/* Zeros between what is demoted are written along, and those at its ends when all must go. */
static void test_demotion(void)
{
    page_set zeros = page_bit(0) | page_bit(5) | page_bit(6) | page_bit(20) | page_bit(N - 1);
    uint64_t freed;
    freeze(device, 0);
    CHECK(write_all(7, zeros) == 0 && n_writes == 0);
    failing = N;
    CHECK(tm_drain(device) == EIO && index_word(device, FIRST + 5) == TM_ZERO);
    failing = n_writes = 0;
    check_all(7, zeros);
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &freed) == 0 && n_writes == 1);
    CHECK(kind_of(0) == TM_ZERO && kind_of(1) == TM_FILE && kind_of(5) == TM_NOWHERE);
    CHECK(tm_drain(device) == 0 && kind_of(0) == TM_NOWHERE && kind_of(N - 1) == TM_NOWHERE);
    check_all(7, zeros);

    CHECK(write_all(8, zeros) == 0 && n_writes == 0);
    CHECK(tm_drain(device) == 0 && n_writes == 1);
    check_all(8, zeros);
}

int main(void)
{
    test_the_set();
    config = config_of(PAGES, ROOM);
    device = open_device(&config);
    freeze(device, 1);
    test_zeros_between_go_along();
    test_far_apart_they_are_two();
    test_stored_pages_between_are_not_taken_from_the_file();
    test_what_has_changed_since_stays_so();
    test_what_has_changed_twice_stays_so();
    test_a_failed_spill();
    test_demotion();
    tm_close(device);
    puts("ok");
    return 0;
}
