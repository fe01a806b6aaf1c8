/* SPDX-License-Identifier: BSD-3-Clause */
/* What may happen to a page of a cache device between its being read from the source and its being
 * put, and what the source's failures leave. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>

#include "fixture.h"
#include "index.h"
#include "promote.h"

enum { PAGES = 1600, PAGE = 7, ROOM = 16 << 20 };

static struct tm_device *device;
static struct tm_config config;

/* Who puts the copies waits while this is set. */
static _Atomic bool held;

bool __real_staging_take(struct staging *staging, struct staged *oldest, unsigned done);
bool __wrap_staging_take(struct staging *staging, struct staged *oldest, unsigned done);
bool __wrap_staging_take(struct staging *staging, struct staged *oldest, unsigned done)
{
    bool taken = __real_staging_take(staging, oldest, done);
    while (taken && atomic_load(&held))
        sched_yield();
    return taken;
}

/* What another thread does while a copy is being put, once. */
static void *(*amid_put)(void *);
static pthread_t other;

bool __real_promote_put(struct tm_device *of, uint64_t page, const uint8_t *content,
                        uint64_t again);
bool __wrap_promote_put(struct tm_device *of, uint64_t page, const uint8_t *content,
                        uint64_t again);
bool __wrap_promote_put(struct tm_device *of, uint64_t page, const uint8_t *content, uint64_t again)
{
    void *(*work)(void *) = amid_put;
    amid_put = NULL;
    if (work) {
        CHECK(pthread_create(&other, NULL, work, NULL) == 0);
        for (int i = 0; i < 20000; i++) /* it has the time to do what it may */
            sched_yield();
    }
    return __real_promote_put(of, page, content, again);
}

/* Return when no copy waits. */
static void put_copies(void)
{
    bool waiting = true;
    atomic_store(&held, false);
    while (waiting) {
        pthread_mutex_lock(&device->staging.lock);
        waiting = device->staging.in != device->staging.done;
        pthread_mutex_unlock(&device->staging.lock);
    }
}

/* What another does while this process calls the kernel, once. */
static void (*meanwhile)(void);

static void let_others_work(void)
{
    void (*work)(void) = meanwhile;
    meanwhile = NULL;
    if (work)
        work();
}

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    ssize_t got = syscall(SYS_pread64, fd, buffer, length, offset);
    let_others_work();
    return got;
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    let_others_work();
    return syscall(SYS_pwrite64, fd, buffer, length, offset);
}

static bool syncs_fail;

int fdatasync(int fd)
{
    errno = EIO;
    return syncs_fail ? -1 : (int)syscall(SYS_fdatasync, fd);
}

/* Version 0 is zeros. */
static void fill(uint8_t *content, uint64_t page, uint8_t version)
{
    for (size_t i = 0; i < TM_PAGE; i++)
        content[i] = (uint8_t)((i + page + 1) * version);
}

static void write_version(uint64_t page, uint8_t version)
{
    uint8_t content[TM_PAGE];
    fill(content, page, version);
    CHECK(tm_write(device, content, TM_PAGE, page * TM_PAGE, false) == 0);
}

static bool reads(uint64_t page, uint8_t version)
{
    uint8_t content[TM_PAGE], expected[TM_PAGE];
    fill(expected, page, version);
    CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0);
    return memcmp(content, expected, TM_PAGE) == 0;
}

static enum kind kind_of(uint64_t page) { return word_kind(index_word(device, page)); }

static void open_again(void)
{
    tm_close(device);
    device = open_device(&config);
}

/* Read and write all pages before any copy is put; all again, for whoever serves the pool next. */
static void test_what_was_read_is_not_put_over_what_was_written_since(void)
{
    for (uint8_t version = 1; version < 4; version++) {
        atomic_store(&held, true);
        for (uint64_t page = 0; page < PAGES; page++)
            CHECK(reads(page, version - 1));
        for (uint64_t page = 0; page < PAGES; page++)
            write_version(page, version);
        put_copies();
        for (uint64_t page = 0; page < PAGES; page++)
            CHECK(reads(page, version));
        tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0});
        open_again();
    }
}

static void read_run(uint64_t page, uint32_t n)
{
    static uint8_t content[TM_RUN_MAX * TM_PAGE];
    CHECK(tm_read(device, content, n * TM_PAGE, page * TM_PAGE) == 0);
}

/* Read more pages than the queue holds, so many at a time; how many are in tmem before the first
 * copy is put. */
static uint64_t put_by_readers(uint32_t at_a_time)
{
    tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0});
    atomic_store(&held, true);
    for (uint64_t page = 0; page + at_a_time <= PAGES; page += at_a_time)
        read_run(page, at_a_time);
    uint64_t stored = atomic_load(&device->counters->pages_in_tmem);
    put_copies();
    return stored;
}

static void test_where_workers_are_behind_readers_put_what_they_needed(void)
{
    for (uint64_t page = 0; page < PAGES; page++)
        write_version(page, 3);
    put_copies();
    CHECK(put_by_readers(1) >= PAGES - STAGING_PAGES - 1);
    CHECK(put_by_readers(TM_FAULT_MAX * 2) == 0); /* that was no fault: it is dropped */
}

static void test_of_two_writes_the_second_is_put(void)
{
    atomic_store(&held, true);
    write_version(PAGE, 1);
    write_version(PAGE, 2);
    put_copies();
    CHECK(kind_of(PAGE) == TM_TMEM && reads(PAGE, 2));
}

static void *write_newest(void *unused)
{
    write_version(PAGE, 5);
    return unused;
}

static void test_a_write_waits_for_the_put_of_what_was(void)
{
    write_version(PAGE, 4);
    put_copies();
    tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0});
    amid_put = write_newest;
    CHECK(reads(PAGE, 4));
    put_copies();
    CHECK(pthread_join(other, NULL) == 0);
    put_copies();
    CHECK(reads(PAGE, 5));
}

static void test_what_was_read_is_not_put_over_a_trim(void)
{
    write_version(PAGE, 1);
    put_copies();
    tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0});
    atomic_store(&held, true);
    CHECK(reads(PAGE, 1));
    CHECK(tm_trim(device, TM_PAGE, PAGE * TM_PAGE, false) == 0);
    put_copies();
    CHECK(kind_of(PAGE) == TM_NOWHERE && reads(PAGE, 0));
}

static void write_version_5(void) { write_version(PAGE, 5); }

static void test_a_write_amid_a_read_is_seen_by_the_next(void)
{
    write_version(PAGE, 4);
    put_copies();
    tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0});
    meanwhile = write_version_5;
    CHECK(reads(PAGE, 5));
    put_copies();
    CHECK(kind_of(PAGE) == TM_TMEM && reads(PAGE, 5));
}

static void evict(void)
{
    uint64_t freed;
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &freed) == 0);
    CHECK(tm_drain(device) == 0);
}

static void test_eviction_amid_a_write_neither_fails_nor_brings_back_what_was(void)
{
    write_version(PAGE, 1);
    put_copies();
    meanwhile = evict;
    write_version(PAGE, 2);
    CHECK(reads(PAGE, 2));
    put_copies();
    CHECK(kind_of(PAGE) == TM_TMEM && reads(PAGE, 2));
}

/* Words change while nobody serves the pool. */
static void damage_words(unsigned *seed)
{
    struct tm_layout layout;
    CHECK(tm_layout_for(config.size, &layout) == 0);
    for (unsigned i = 0; i < PAGES / 4; i++) {
        off_t at = (off_t)(layout.index_offset + rand_r(seed) % PAGES * sizeof(uint64_t));
        uint64_t word, bits = (uint64_t)rand_r(seed) << 33 ^ (uint64_t)rand_r(seed) << 4;
        CHECK(pread(config.pool_fd, &word, sizeof word, at) == sizeof word);
        word ^= rand_r(seed) % 2 ? bits | rand_r(seed) % 16 : UINT64_C(1) << rand_r(seed) % 28;
        if (word) /* zeros, as far as anybody can tell */
            CHECK(pwrite(config.pool_fd, &word, sizeof word, at) == sizeof word);
    }
}

static void test_damaged_words_are_misses(void)
{
    unsigned seed = 1;
    for (uint64_t page = 0; page < PAGES; page++)
        write_version(page, 1 + page % 7);
    for (unsigned round = 0; round < 50; round++) {
        put_copies();
        tm_close(device);
        damage_words(&seed);
        device = open_device(&config);
        if (round % 3 == 0)
            tm_compact(device, UINT64_MAX);
        if (round % 3 == 1)
            evict();
        for (uint64_t page = 0; page < PAGES; page++)
            CHECK(reads(page, 1 + page % 7));
    }
    put_copies();
    CHECK(atomic_load(&tm_counters(device)->pages_in_tmem));
}

/* The kernel forgets what it could not write: then whatever the source holds is right. */
static void test_after_a_failed_sync_the_source_is_what_is_read(void)
{
    struct tm_extent extent;
    size_t n = 1;
    uint8_t lost[TM_PAGE];
    fill(lost, PAGE, 9);
    write_version(PAGE, 1);
    write_version(PAGE + 1, 0);
    put_copies();
    CHECK(kind_of(PAGE) == TM_TMEM && kind_of(PAGE + 1) == TM_NOWHERE);
    syncs_fail = true;
    CHECK(tm_flush(device) == EIO);
    syncs_fail = false;
    for (uint64_t page = PAGE; page < PAGE + 2; page++) {
        fill(lost, page, 9);
        CHECK(syscall(SYS_pwrite64, config.file_fd, lost, TM_PAGE, page * TM_PAGE) == TM_PAGE);
        CHECK(reads(page, 9));
        CHECK(tm_extents(device, TM_PAGE, page * TM_PAGE, &extent, &n) == 0 && !extent.zero);
        CHECK(tm_write(device, "x", 1, page * TM_PAGE, false) == 0);
        lost[0] = 'x';
        uint8_t content[TM_PAGE];
        CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0);
        CHECK(memcmp(content, lost, TM_PAGE) == 0);
        CHECK(tm_zero(device, TM_PAGE, page * TM_PAGE, false) == 0 && reads(page, 0));
    }
    CHECK(tm_flush(device) == EIO);
}

int main(void)
{
    static const uint8_t states[] = {TM_STATE_FILE, TM_STATE_FILE};
    config = config_of(PAGES, ROOM);
    config.ephemeral = true;
    config.bitmap_fd = -1;
    CHECK(pwrite(config.pool_fd, states, sizeof states, TM_STATES_OFFSET) == sizeof states);
    device = open_device(&config);
    test_what_was_read_is_not_put_over_what_was_written_since();
    test_where_workers_are_behind_readers_put_what_they_needed();
    test_of_two_writes_the_second_is_put();
    test_a_write_waits_for_the_put_of_what_was();
    test_what_was_read_is_not_put_over_a_trim();
    test_a_write_amid_a_read_is_seen_by_the_next();
    test_eviction_amid_a_write_neither_fails_nor_brings_back_what_was();
    test_damaged_words_are_misses();
    test_after_a_failed_sync_the_source_is_what_is_read();
    tm_close(device);
    puts("ok");
    return 0;
}
