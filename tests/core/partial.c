/* SPDX-License-Identifier: BSD-3-Clause */
/* What a kill leaves between the reading of a page and the writing of a part of it: words that
 * exist; and of whole pages that others read meanwhile: what they were. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/syscall.h>

#include "fixture.h"
#include "overwrite.h"

enum { PAGES = 2048, PAGE = 600, ROOM = 64 << 20, RUN = 16 };

static struct tm_config config;
static struct tm_device *device;
static unsigned looked_at;

int __real_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run)
{
    uint64_t word = index_word(device, run->first);
    looked_at++;
    CHECK(word_kind(word) != TM_NOWHERE || word == TM_NOWHERE);
    return __real_overwrite_locked(device, run);
}

/* Whether each page of the run is full of its number and this. */
static bool run_is(struct tm_device *server, uint8_t version)
{
    uint8_t content[TM_PAGE], expected[TM_PAGE];
    for (uint8_t i = 0; i < RUN; i++) {
        memset(expected, version + i, TM_PAGE);
        if (tm_read(server, content, TM_PAGE, (uint64_t)(PAGE + i) * TM_PAGE) != 0 ||
            memcmp(content, expected, TM_PAGE) != 0)
            return false;
    }
    return true;
}

static bool watched;

/* Before the file is written somebody reads the pages; then whoever would come after a kill. */
ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    if (watched && fd == config.file_fd) {
        watched = false;
        CHECK(run_is(device, 1));
        struct tm_device *next = open_device(&config);
        CHECK(run_is(next, 1));
        tm_close(next);
    }
    return syscall(SYS_pwrite64, fd, buffer, length, offset);
}

static void write_run(uint8_t version)
{
    static uint8_t content[RUN * TM_PAGE];
    for (uint8_t i = 0; i < RUN; i++)
        memset(content + (size_t)i * TM_PAGE, version + i, TM_PAGE);
    CHECK(tm_write(device, content, sizeof content, (uint64_t)PAGE * TM_PAGE, false) == 0);
}

static void test_a_part(void)
{
    char byte;
    CHECK(tm_write(device, "x", 1, (uint64_t)PAGE * TM_PAGE + 5, false) == 0 && looked_at == 1);
    CHECK(tm_read(device, &byte, 1, (uint64_t)PAGE * TM_PAGE + 5) == 0 && byte == 'x');
}

static void test_whole_pages_that_are_read_meanwhile(void)
{
    write_run(1);
    tm_begin_generation(device); /* reads change the words */
    watched = true;
    write_run(101);
    CHECK(!watched && run_is(device, 101));
}

int main(void)
{
    config = config_of(PAGES, ROOM);
    device = open_device(&config);
    freeze(device, 1); /* puts are refused: what is written goes to the file */
    test_a_part();
    test_whole_pages_that_are_read_meanwhile();
    tm_close(device);
    puts("ok");
    return 0;
}
