/* SPDX-License-Identifier: BSD-3-Clause */
/* What is fetched ahead is what the page is, comes once, goes first, and only into memory that
 * nobody needs; whatever happens meanwhile. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include "prefetch.h"

#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "fixture.h"
#include "index.h"

enum { PAGES = 2048, FIRST = 600, MANY = 400, ROOM = 16 << 20 };

static struct tm_device *device;
static struct tm_config config;

/* Of the file: what threads that fetch ahead are told, and who reads which page. */
static _Atomic bool held, failing;
static _Atomic unsigned n_held, n_reads[PAGES], n_fetches, kill_at;
static _Atomic uint64_t now_ns, read_ns;
static pthread_t requester;

static void be_killed_when_due(void)
{
    if (atomic_load(&kill_at) && atomic_fetch_sub(&kill_at, 1) == 1)
        kill(getpid(), SIGKILL);
}

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    ssize_t got = syscall(SYS_pread64, fd, buffer, length, offset);
    atomic_fetch_add(&now_ns, atomic_load(&read_ns));
    if (fd != config.file_fd)
        return got;
    for (size_t i = 0; i < length / TM_PAGE; i++)
        atomic_fetch_add(&n_reads[(size_t)offset / TM_PAGE + i], 1);
    if (pthread_equal(pthread_self(), requester))
        return got;
    atomic_fetch_add(&n_fetches, 1);
    atomic_fetch_add(&n_held, 1);
    while (atomic_load(&held))
        sched_yield();
    atomic_fetch_sub(&n_held, 1);
    be_killed_when_due();
    errno = EIO;
    return atomic_load(&failing) ? -1 : got;
}

int __wrap_clock_gettime(clockid_t id, struct timespec *now);
int __wrap_clock_gettime(clockid_t id, struct timespec *now)
{
    (void)id;
    uint64_t ns = atomic_load(&now_ns);
    *now =
        (struct timespec){.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    return 0;
}

/* Nobody waits for long where everybody is impatient, and for ever where nobody is. */
static _Atomic bool impatient;

int __wrap_pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *lock, clockid_t clock,
                                  const struct timespec *until);
int __wrap_pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *lock, clockid_t clock,
                                  const struct timespec *until)
{
    (void)clock;
    (void)until;
    return atomic_load(&impatient) ? ETIMEDOUT : pthread_cond_wait(condition, lock);
}

static void fill(uint8_t *content, uint64_t page, uint8_t version)
{
    for (size_t i = 0; i < TM_PAGE; i++)
        content[i] = (uint8_t)((i + page % 251 + 1) * version);
}

static void write_version(uint64_t page, uint8_t version)
{
    uint8_t content[TM_PAGE];
    fill(content, page, version);
    CHECK(tm_write(device, content, TM_PAGE, page * TM_PAGE, false) == 0);
}

/* In the file alone. */
static void spill(uint64_t page, uint8_t version)
{
    freeze(device, 1);
    write_version(page, version);
    freeze(device, 0);
}

static void check_reads(uint64_t page, uint8_t version)
{
    uint8_t content[TM_PAGE], expected[TM_PAGE];
    fill(expected, page, version);
    CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0);
    CHECK(memcmp(content, expected, TM_PAGE) == 0);
}

static enum kind kind_of(uint64_t page) { return word_kind(index_word(device, page)); }

static bool is_ahead(uint64_t page) { return word_is_ahead(index_word(device, page)); }

static unsigned n_ahead(void)
{
    unsigned n = 0;
    for (uint64_t page = 0; page < PAGES; page++)
        n += is_ahead(page);
    return n;
}

static uint64_t count(const _Atomic uint64_t *counter) { return atomic_load(counter); }

/* Return when nothing is being fetched. */
static void settle(void)
{
    atomic_store(&held, false);
    while (atomic_load(&device->prefetch.ahead.n_runs))
        sched_yield();
}

/* A new device, of which MANY pages from FIRST on are in the file alone. */
static void begin(enum tm_prefetch mode)
{
    config = config_of(PAGES, ROOM);
    config.prefetch = mode;
    device = open_device(&config);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        spill(page, 1);
    for (unsigned page = 0; page < PAGES; page++)
        atomic_store(&n_reads[page], 0);
    atomic_store(&n_fetches, 0);
}

static void end(void)
{
    settle();
    const struct tm_counters *counters = tm_counters(device);
    CHECK(count(&counters->prefetches) ==
          count(&counters->prefetch_hits) + count(&counters->prefetch_wastes) + n_ahead());
    CHECK(!count(&counters->io_errors) && !count(&counters->bad_checksums));
    tm_close(device);
    close(config.pool_fd);
    close(config.file_fd);
    close(config.bitmap_fd);
}

/* Read in order until the page behind is being fetched, by a thread that is held up. */
static uint64_t read_until_held(uint64_t page)
{
    atomic_store(&held, true);
    for (unsigned before = atomic_load(&n_fetches); atomic_load(&n_fetches) == before; page++) {
        check_reads(page, 1);
        while (atomic_load(&device->prefetch.ahead.n_runs) && !atomic_load(&n_held))
            sched_yield();
    }
    return page;
}

static void test_each_page_is_read_once(void)
{
    begin(TM_PREFETCH_YES);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    settle();
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK(atomic_load(&n_reads[page]) == (page >= FIRST && page < FIRST + MANY));
    const struct tm_counters *counters = tm_counters(device);
    CHECK(count(&counters->prefetch_hits) > MANY - 10 && !count(&counters->prefetch_wastes));
    CHECK(count(&counters->gets) == count(&counters->prefetch_hits));
    CHECK(count(&counters->file_reads) + count(&counters->gets) == MANY);
    end();
}

static void overwrite(uint64_t page) { write_version(page, 2); }
static void overwrite_in_file(uint64_t page) { spill(page, 2); }
static void trim(uint64_t page) { CHECK(tm_trim(device, TM_PAGE, page * TM_PAGE, false) == 0); }

/* What was read before a page changed does not come in after that. */
static void test_a_page_that_changes_meanwhile(void (*change)(uint64_t page), enum kind kind,
                                               uint8_t version)
{
    begin(TM_PREFETCH_YES);
    uint64_t page = read_until_held(FIRST);
    change(page);
    settle();
    CHECK(kind_of(page) == kind && !is_ahead(page));
    CHECK(!count(&tm_counters(device)->prefetches));
    check_reads(page, version);
    end();
}

static void test_a_page_that_is_trimmed_meanwhile(void)
{
    static const uint8_t zeros[TM_PAGE];
    uint8_t content[TM_PAGE];
    begin(TM_PREFETCH_YES);
    uint64_t page = read_until_held(FIRST);
    trim(page);
    settle();
    CHECK(kind_of(page) == TM_ZERO);
    CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0);
    CHECK(memcmp(content, zeros, TM_PAGE) == 0);
    end();
}

/* Somebody is changing the page: nobody waits for that. */
static void test_a_page_that_is_locked_meanwhile(void)
{
    begin(TM_PREFETCH_YES);
    uint64_t page = read_until_held(FIRST);
    lock_pages(&device->locks, page, 1);
    settle();
    unlock_pages(&device->locks, page, 1);
    CHECK(kind_of(page) == TM_FILE);
    check_reads(page, 1);
    end();
}

static _Atomic bool has_read;

static void *read_page(void *page)
{
    check_reads((uint64_t)(uintptr_t)page, 1);
    atomic_store(&has_read, true);
    return NULL;
}

/* A file that hangs: who wants a page that is on its way waits, nobody else does. */
static void test_a_fetch_that_hangs(void)
{
    pthread_t reader;
    begin(TM_PREFETCH_YES);
    write_version(FIRST + MANY, 1);
    uint64_t page = read_until_held(FIRST), before = atomic_load(&n_reads[page]);
    atomic_store(&has_read, false);
    CHECK(pthread_create(&reader, NULL, read_page, (void *)(uintptr_t)page) == 0);
    for (unsigned i = 0; i < 1000; i++) {
        check_reads(FIRST + MANY, 1);
        check_reads(FIRST + MANY - 1, 1);
        sched_yield();
    }
    CHECK(!atomic_load(&has_read));
    settle();
    CHECK(pthread_join(reader, NULL) == 0 && atomic_load(&has_read));
    CHECK(before == 1 && atomic_load(&n_reads[page]) == 1);
    end();
}

static void test_a_fetch_that_hangs_for_long(void)
{
    begin(TM_PREFETCH_YES);
    uint64_t page = read_until_held(FIRST);
    atomic_store(&impatient, true);
    check_reads(page, 1);
    CHECK(atomic_load(&n_reads[page]) == 2 && atomic_load(&n_held));
    atomic_store(&impatient, false);
    end();
}

/* It is for the request to say that the file fails, not for what is fetched ahead of it. */
static void test_fetches_that_fail(void)
{
    begin(TM_PREFETCH_YES);
    atomic_store(&failing, true);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    settle();
    CHECK(atomic_load(&n_fetches) && !count(&tm_counters(device)->prefetches));
    CHECK(count(&tm_counters(device)->file_reads) == MANY);
    atomic_store(&failing, false);
    end();
}

/* Pages that were fetched in vain leave before any other, without a write. */
static void test_what_nobody_used_goes_first(void)
{
    uint64_t freed;
    begin(TM_PREFETCH_YES);
    write_version(FIRST + MANY, 1);
    for (uint64_t page = FIRST; page < FIRST + MANY / 2; page++)
        check_reads(page, 1);
    settle();
    unsigned before = n_ahead();
    CHECK(before > 10);
    for (unsigned i = 0; i < TM_ANCIENT - 1; i++)
        tm_begin_generation(device); /* all others grow old as well */
    check_reads(FIRST, 1);
    CHECK(tm_demote(device, (uint64_t)before * TM_SLOT_MIN, (struct tm_filter){0}, &freed) == 0);
    CHECK(n_ahead() < before && kind_of(FIRST) == TM_TMEM && kind_of(FIRST + MANY) == TM_TMEM);
    CHECK(count(&tm_counters(device)->prefetch_wastes) == before - n_ahead());
    CHECK(count(&tm_counters(device)->demotions) == before - n_ahead());
    CHECK(!count(&tm_counters(device)->demotion_writes));
    end();
}

/* Used once it is as young as any. */
static void test_what_was_used_is_young(void)
{
    begin(TM_PREFETCH_YES);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    for (uint64_t page = FIRST + 10; page < FIRST + MANY; page++)
        CHECK(state_age(device, index_word(device, page)) == 0);
    end();
}

static void test_unused_pages_that_change_are_waste(void)
{
    begin(TM_PREFETCH_YES);
    for (uint64_t page = FIRST; page < FIRST + MANY / 2; page++)
        check_reads(page, 1);
    settle();
    uint64_t before = n_ahead();
    write_version(FIRST + MANY / 2, 2);
    trim(FIRST + MANY / 2 + 1);
    CHECK(count(&tm_counters(device)->prefetch_wastes) == 2 && n_ahead() == before - 2);
    check_reads(FIRST + MANY / 2, 2);
    end();
}

static void test_nothing_is_fetched_without_room(void)
{
    begin(TM_PREFETCH_YES);
    freeze(device, 1);
    for (uint64_t page = FIRST; page < FIRST + 100; page++)
        check_reads(page, 1);
    freeze(device, 0);
    struct tm_control *control = (struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    uint64_t target = count(&tm_counters(device)->used);
    atomic_store(&control->target.complement, ~target);
    atomic_store(&control->target.value, target);
    for (uint64_t page = FIRST + 100; page < FIRST + 200; page++)
        check_reads(page, 1);
    settle();
    CHECK(!atomic_load(&n_fetches) && kind_of(FIRST + 150) == TM_FILE);
    end();
}

static void test_nothing_is_fetched_where_it_is_off(void)
{
    begin(TM_PREFETCH_NO);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    CHECK(!atomic_load(&n_fetches) && !count(&tm_counters(device)->prefetching));
    end();
}

/* It is on while misses are dear. */
static void test_misses_decide(void)
{
    begin(TM_PREFETCH_AUTO);
    atomic_store(&read_ns, 2000000);
    for (uint64_t page = FIRST; page < FIRST + 64; page++)
        check_reads(page, 1);
    CHECK(!atomic_load(&n_fetches) && count(&tm_counters(device)->prefetching) == 1);
    for (uint64_t page = FIRST + 64; page < FIRST + 128; page++)
        check_reads(page, 1);
    settle();
    unsigned fetches = atomic_load(&n_fetches);
    CHECK(fetches);
    atomic_store(&read_ns, 50000);
    freeze(device, 1); /* or they would be no misses */
    for (uint64_t page = FIRST + 250; page < FIRST + 380; page++)
        check_reads(page, 1);
    freeze(device, 0);
    CHECK(!count(&tm_counters(device)->prefetching));
    for (uint64_t page = FIRST + 380; page < FIRST + MANY; page++)
        check_reads(page, 1);
    CHECK(atomic_load(&n_fetches) == fetches);
    atomic_store(&read_ns, 0);
    end();
}

/* Killed as the nth fetch ends: all pages are what they were. */
static void test_a_process_that_is_killed(unsigned nth)
{
    begin(TM_PREFETCH_YES);
    tm_close(device);
    pid_t child = fork();
    CHECK(child >= 0);
    if (!child) {
        requester = pthread_self();
        device = open_device(&config);
        atomic_store(&kill_at, nth);
        for (uint64_t page = FIRST; page < FIRST + MANY; page++)
            check_reads(page, 1);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status));
    device = open_device(&config);
    unsigned fetched = n_ahead();
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    CHECK(nth < 2 || fetched || count(&tm_counters(device)->prefetch_hits));
    settle();
    tm_close(device);
    close(config.pool_fd);
    close(config.file_fd);
    close(config.bitmap_fd);
}

/* A new pool over a file or source that has version 1 of all pages. */
static void begin_with_nothing_in_tmem(void)
{
    static const uint8_t states[] = {TM_STATE_FILE, TM_STATE_FILE, TM_STATE_FILE, TM_STATE_FILE};
    uint8_t content[TM_PAGE];
    atomic_store(&n_fetches, 0);
    CHECK(pwrite(config.pool_fd, states, sizeof states, TM_STATES_OFFSET) == sizeof states);
    for (uint64_t page = 0; page < PAGES; page++) {
        fill(content, page, 1);
        CHECK(pwrite(config.file_fd, content, TM_PAGE, (off_t)(page * TM_PAGE)) == TM_PAGE);
    }
    device = open_device(&config);
    for (unsigned page = 0; page < PAGES; page++)
        atomic_store(&n_reads[page], 0);
}

static void begin_cache(uint64_t room)
{
    config = config_of(PAGES, room);
    config.prefetch = TM_PREFETCH_YES;
    config.ephemeral = true;
    close(config.bitmap_fd);
    config.bitmap_fd = -1;
    begin_with_nothing_in_tmem();
}

/* Another host's device, or what the last one left before this host died: no checksum is known. */
static void begin_elsewhere(enum tm_prefetch mode)
{
    config = config_of(PAGES, ROOM);
    config.prefetch = mode;
    begin_with_nothing_in_tmem();
    CHECK(index_word(device, FIRST) == (TM_FILE | TM_WORD_UNVERIFIED));
}

static void test_pages_without_a_checksum_are_fetched(void)
{
    begin_elsewhere(TM_PREFETCH_YES);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    settle();
    CHECK(count(&tm_counters(device)->prefetch_hits) > MANY - 10);
    end();
}

static void *warm(void *error)
{
    *(int *)error = tm_warm(device, FIRST, MANY);
    return NULL;
}

/* Have a thread warm it, which is held up at the first page. */
static pthread_t warm_until_held(int *error)
{
    pthread_t thread;
    atomic_store(&held, true);
    CHECK(pthread_create(&thread, NULL, warm, error) == 0);
    while (!atomic_load(&n_held))
        sched_yield();
    return thread;
}

static void test_what_is_listed_is_read_once(void)
{
    begin_elsewhere(TM_PREFETCH_NO);
    CHECK(tm_warm(device, FIRST, MANY) == 0 && tm_warm(device, FIRST, MANY) == 0);
    CHECK(n_ahead() == MANY && count(&tm_counters(device)->prefetches) == MANY);
    for (uint64_t page = FIRST; page < FIRST + MANY; page++)
        check_reads(page, 1);
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK(atomic_load(&n_reads[page]) == (page >= FIRST && page < FIRST + MANY));
    CHECK(count(&tm_counters(device)->prefetch_hits) == MANY);
    end();
}

static void test_a_listed_page_that_changes_meanwhile(void (*change)(uint64_t page), enum kind kind,
                                                      uint8_t version)
{
    int error;
    begin_elsewhere(TM_PREFETCH_NO);
    pthread_t thread = warm_until_held(&error);
    change(FIRST);
    atomic_store(&held, false);
    CHECK(pthread_join(thread, NULL) == 0 && !error);
    CHECK(kind_of(FIRST) == kind && !is_ahead(FIRST) && is_ahead(FIRST + 1));
    check_reads(FIRST, version);
    end();
}

/* Not a page more than there is room for, and none where the file fails. */
static void test_what_is_listed_finds_no_room(void)
{
    begin_elsewhere(TM_PREFETCH_NO);
    struct tm_control *control = (struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    uint64_t target = count(&tm_counters(device)->used) + (TM_SPAN_BYTES << 1);
    atomic_store(&control->target.complement, ~target);
    atomic_store(&control->target.value, target);
    CHECK(tm_warm(device, 0, PAGES) == ENOSPC);
    CHECK(n_ahead() && count(&tm_counters(device)->used) <= target);
    freeze(device, 1);
    CHECK(tm_warm(device, PAGES - 1, 1) == ENOSPC && kind_of(PAGES - 1) == TM_FILE);
    end();
    begin_elsewhere(TM_PREFETCH_NO);
    int error;
    atomic_store(&failing, true);
    pthread_t thread = warm_until_held(&error);
    atomic_store(&held, false);
    CHECK(pthread_join(thread, NULL) == 0 && error == EIO && !n_ahead());
    atomic_store(&failing, false);
    end();
}

static void test_a_page_of_a_source_that_changes_meanwhile(void)
{
    begin_cache(ROOM);
    uint64_t page = read_until_held(FIRST);
    write_version(page, 2);
    settle();
    CHECK(!is_ahead(page));
    check_reads(page, 2);
    end();
}

/* Whoever reads all of a source, far more than there is room for, has it fetched ahead to its end;
 * what was used again stays. */
static void test_a_full_cache(void)
{
    enum { HOT = 64 };
    begin_cache(PAGES / 8 * 1024);
    CHECK(tm_cache(device, HOT * TM_PAGE, 0) == 0);
    for (uint64_t page = 0; page < HOT; page++)
        check_reads(page, 1);
    for (uint64_t page = FIRST; page < PAGES; page++)
        check_reads(page, 1);
    settle();
    CHECK(count(&tm_counters(device)->prefetch_hits) > (PAGES - FIRST) * 9 / 10);
    for (uint64_t page = 0; page < HOT; page++)
        CHECK(kind_of(page) == TM_TMEM);
    end();
}

int main(void)
{
    requester = pthread_self();
    test_each_page_is_read_once();
    test_a_page_that_changes_meanwhile(overwrite, TM_TMEM, 2);
    test_a_page_that_changes_meanwhile(overwrite_in_file, TM_FILE, 2);
    test_a_page_that_is_trimmed_meanwhile();
    test_a_page_that_is_locked_meanwhile();
    test_a_fetch_that_hangs();
    test_a_fetch_that_hangs_for_long();
    test_fetches_that_fail();
    test_what_nobody_used_goes_first();
    test_what_was_used_is_young();
    test_unused_pages_that_change_are_waste();
    test_nothing_is_fetched_without_room();
    test_nothing_is_fetched_where_it_is_off();
    test_misses_decide();
    for (unsigned nth = 1; nth < 8; nth++)
        test_a_process_that_is_killed(nth);
    test_a_page_of_a_source_that_changes_meanwhile();
    test_a_full_cache();
    test_pages_without_a_checksum_are_fetched();
    test_what_is_listed_is_read_once();
    test_a_listed_page_that_changes_meanwhile(overwrite, TM_TMEM, 2);
    test_a_listed_page_that_changes_meanwhile(overwrite_in_file, TM_FILE, 2);
    test_what_is_listed_finds_no_room();
    puts("ok");
    return 0;
}
