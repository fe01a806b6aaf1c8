/* SPDX-License-Identifier: BSD-3-Clause */
/* Many threads on overlapping pages, while others demote, compact, drain, age and change the
 * target.
 *
 * usage: stress OPERATIONS SEED file|durable|handover|far|ram|cache
 *
 * The device has three regions. Pages of the first are written by one thread each, so that every
 * read, by whichever thread, must find a version between the last one acknowledged before it began
 * and the last one begun when it ended. Pages of the second are written by all; a read must find
 * one whole write. The third takes requests of any size and offset and is there for the sanitizers.
 * Exit status 0 and 'ok' when nothing was wrong.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "state.h"

enum { THREADS = 4, SPAN = 640, PAGES = 3 * SPAN, RUN = 8, REGION = 1 << 20 };

static struct tm_device *device;
static struct tm_control *control;
static uint64_t operations, minimum, limit;
static bool has_file, hands_over, is_far;
static int file_fd = -1, bitmap_fd = -1;
static _Atomic uint32_t begun[SPAN], acknowledged[SPAN];
static _Atomic int working = THREADS;

#define CHECK(condition, ...)                                                                      \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);                                        \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static uint64_t rnd(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* A number below n, mostly a small one. */
static uint32_t hot(uint64_t *seed, uint32_t n)
{
    return (uint32_t)(rnd(seed) % (rnd(seed) % 4 ? n / 10 : n));
}

/* A page's content for a version: zeros for every eighth one, else noise and repetition. The share
 * of noise takes few values, so that many records are of one size class and a slot that was freed
 * is soon another page's. */
static void fill(uint8_t *page, uint32_t number, uint32_t version)
{
    uint64_t words[TM_PAGE / 8],
        state = ((uint64_t)number << 32 | version) * 0x9e3779b97f4a7c15 | 1;
    size_t noise = rnd(&state) % 4 * (TM_PAGE / 8 / 4);

    for (size_t i = 0; i < TM_PAGE / 8; i++)
        words[i] = i < noise ? rnd(&state) : i % 16;
    words[0] = (uint64_t)number << 32 | version;
    memcpy(page, words, TM_PAGE);
    if (version % 8 == 0)
        memset(page, 0, TM_PAGE);
}

static bool is_version(const uint8_t *page, uint32_t number, uint32_t version)
{
    uint8_t expected[TM_PAGE];

    fill(expected, number, version);
    return memcmp(page, expected, TM_PAGE) == 0;
}

/* Without a backing file a write may be refused: try until it is stored. */
static void write_pages(const uint8_t *data, uint32_t first, uint32_t count, bool fua)
{
    int error;

    do
        error = tm_write(device, data, count * TM_PAGE, (uint64_t)first * TM_PAGE, fua);
    while (error == EIO && !has_file);
    CHECK(error == 0, "write of page %u: %s", first, strerror(error));
}

static void write_own(uint64_t *seed, unsigned thread)
{
    uint8_t data[RUN * TM_PAGE];
    uint32_t first = (hot(seed, SPAN / RUN / THREADS) * THREADS + thread) * RUN;
    uint32_t version = atomic_load(&begun[first]) + 1;
    int error = 0;

    for (uint32_t i = 0; i < RUN; i++) {
        atomic_store(&begun[first + i], version);
        fill(data + i * TM_PAGE, first + i, version);
    }
    if (version % 16 == 0)
        error = tm_trim(device, sizeof data, (uint64_t)first * TM_PAGE, false);
    else if (version % 16 == 8)
        error = tm_zero(device, sizeof data, (uint64_t)first * TM_PAGE, false);
    else
        write_pages(data, first, RUN, version % 32 == 1);
    CHECK(error == 0, "version %u: %s", version, strerror(error));
    for (uint32_t i = 0; i < RUN; i++)
        atomic_store(&acknowledged[first + i], version);
}

static void read_own(uint32_t number)
{
    uint8_t page[TM_PAGE];
    uint32_t low = atomic_load(&acknowledged[number]);
    int error = tm_read(device, page, TM_PAGE, (uint64_t)number * TM_PAGE);
    uint32_t high = atomic_load(&begun[number]);

    CHECK(error == 0, "read of page %u: %s", number, strerror(error));
    for (uint32_t version = high; version + 1 > low; version--)
        if (is_version(page, number, version))
            return;
    CHECK(false, "page %u is no version from %u to %u", number, low, high);
}

static void write_shared(uint64_t *seed)
{
    uint8_t data[RUN * TM_PAGE];
    uint32_t first = SPAN + (uint32_t)(rnd(seed) % (SPAN - RUN)),
             count = (uint32_t)(rnd(seed) % RUN) + 1;

    for (uint32_t i = 0; i < count; i++)
        fill(data + i * TM_PAGE, first + i, (uint32_t)rnd(seed));
    write_pages(data, first, count, false);
}

static void read_shared(uint64_t *seed)
{
    static const uint8_t zeros[TM_PAGE];
    uint8_t data[RUN * TM_PAGE];
    uint32_t first = SPAN + (uint32_t)(rnd(seed) % (SPAN - RUN));
    int error = tm_read(device, data, sizeof data, (uint64_t)first * TM_PAGE);

    CHECK(error == 0, "read of page %u: %s", first, strerror(error));
    for (uint32_t i = 0; i < RUN; i++) {
        const uint8_t *page = data + i * TM_PAGE;
        uint64_t stamp;
        memcpy(&stamp, page, sizeof stamp);
        CHECK(!memcmp(page, zeros, TM_PAGE) ||
                  (stamp >> 32 == first + i && is_version(page, first + i, (uint32_t)stamp)),
              "page %u is a mixture", first + i);
    }
}

static void any_request(uint64_t *seed)
{
    static const uint64_t base = 2 * (uint64_t)SPAN * TM_PAGE;
    static const uint64_t last_block = (uint64_t)PAGES / TM_BLOCK_PAGES * TM_BLOCK_PAGES * TM_PAGE;
    uint8_t data[3 * TM_PAGE] = {0};
    uint32_t count = (uint32_t)(rnd(seed) % sizeof data) + 1;
    uint64_t offset = base + rnd(seed) % ((uint64_t)SPAN * TM_PAGE - count);
    struct tm_extent extents[8];
    size_t n = 8;
    int error = 0;

    switch (rnd(seed) % 32 ? rnd(seed) % 6 : 6) {
    case 0:
        error = tm_read(device, data, count, offset);
        break;
    case 1:
        error = tm_zero(device, count, offset, false);
        break;
    case 2:
        error = tm_trim(device, count, offset, false);
        break;
    case 3:
        error = tm_extents(device, count, offset, extents, &n);
        break;
    case 4:
        error = tm_cache(device, count, offset);
        break;
    case 6:
        error = tm_trim(device, PAGES * (uint64_t)TM_PAGE - last_block, last_block, false);
        break;
    default:
        memset(data, (int)count, sizeof data);
        error = tm_write(device, data, count, offset, false);
    }
    CHECK(error == 0 || (!has_file && error == EIO), "request of %u at %llu: %s", count,
          (unsigned long long)offset, strerror(error));
}

/* Reads all of the first region in order, so that it is fetched ahead. */
static void *scanner(void *argument)
{
    while (atomic_load(&working))
        for (uint32_t number = 0; number < SPAN; number++)
            read_own(number);
    return argument;
}

static void *worker(void *argument)
{
    unsigned thread = (unsigned)(uintptr_t)argument & 0xff;
    uint64_t seed = (uintptr_t)argument * 0x9e3779b97f4a7c15 | 1;

    for (uint64_t i = 0; i < operations; i++) {
        switch (rnd(&seed) % 6) {
        case 0:
            write_own(&seed, thread);
            break;
        case 1:
            write_shared(&seed);
            break;
        case 2:
            read_shared(&seed);
            break;
        case 3:
            any_request(&seed);
            break;
        default:
            read_own(hot(&seed, SPAN));
        }
    }
    atomic_fetch_sub(&working, 1);
    return NULL;
}

static void set(struct tm_checked *word, uint64_t value)
{
    atomic_store(&word->value, value);
    atomic_store(&word->complement, ~value);
}

static struct tm_filter any_choice(uint64_t *seed)
{
    return (struct tm_filter){
        .min_age = rnd(seed) % 3, .raw_only = rnd(seed) % 4 == 0, .bounded = rnd(seed) % 2};
}

static bool is_in_file(uint32_t number, uint32_t low)
{
    uint8_t page[TM_PAGE];
    CHECK(pread(file_fd, page, TM_PAGE, (off_t)number * TM_PAGE) == TM_PAGE, "%s", strerror(errno));
    for (uint32_t version = atomic_load(&begun[number]); version + 1 > low; version--)
        if (is_version(page, number, version))
            return true;
    return false;
}

/* What FLUSH acknowledges is in the file, and no bit says otherwise, while others write. A page
 * that is being written just now may be a mixture. */
static void check_file(void)
{
    static uint32_t low[SPAN];
    uint8_t bits[TM_PAGE];
    for (uint32_t number = 0; number < SPAN; number++)
        low[number] = atomic_load(&acknowledged[number]);
    CHECK(tm_flush(device) == 0, "flush");
    CHECK(pread(bitmap_fd, bits, TM_PAGE, TM_PAGE) == TM_PAGE, "%s", strerror(errno));
    for (size_t i = 0; i < TM_PAGE; i++)
        CHECK(!bits[i], "a bit is set");
    for (uint32_t number = 0; number < SPAN; number++) {
        int tries = 1000;
        while (!is_in_file(number, low[number]))
            CHECK(--tries, "the file lacks page %u, version %u", number, low[number]);
    }
}

static void hand_over(uint64_t *seed)
{
    bool on = rnd(seed) % 2;
    int error = tm_write_through(device, on);
    CHECK(error == 0, "handover: %s", strerror(error));
    if (on)
        check_file();
}

static void pass_trims(void)
{
    uint64_t left;
    int error = tm_pass_trims(device, &left);
    CHECK(error == 0, "trims: %s", strerror(error));
}

static void *keeper(void *argument)
{
    bool is_first = ((uintptr_t)argument & 0xff) == THREADS;
    uint64_t seed = (uintptr_t)argument | 1, freed;
    int error = 0;

    while (atomic_load(&working)) {
        uint64_t some = rnd(&seed) % (2 << 20);
        if (hands_over && is_first)
            hand_over(&seed);
        if (is_far && is_first)
            pass_trims();
        switch (rnd(&seed) % 9) {
        case 8:
            set(&control->demotion_writes, rnd(&seed) % 100000);
            break;
        case 0:
            set(&control->target, minimum + rnd(&seed) % (limit - minimum));
            break;
        case 1:
            set(&control->frozen, has_file && rnd(&seed) % 4 == 0);
            break;
        case 2:
            tm_compact(device, some % 100);
            break;
        case 3:
            tm_begin_generation(device);
            break;
        case 4:
            error = tm_flush(device);
            break;
        case 5:
            tm_free_slot_bytes(device);
            tm_publish_ages(device);
            break;
        case 6:
            error = has_file && some % 8 == 0 ? tm_drain(device) : 0;
            break;
        default:
            error = has_file ? tm_demote(device, some, any_choice(&seed), &freed) : 0;
        }
        CHECK(error == 0, "keeper: %s", strerror(error));
    }
    return NULL;
}

static int memory_file(const char *name, uint64_t size)
{
    int fd = memfd_create(name, MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0, "%s: %s", name, strerror(errno));
    return fd;
}

static void open_device(const struct tm_config *config)
{
    char error[256] = "";
    int code = tm_open(config, &device, error, sizeof error);

    CHECK(code == 0, "open: %s %s", strerror(code), error);
}

/* As after a pool was lost: all pages are in the file, not verified. */
static void lose_pool(int pool_fd, uint64_t blocks)
{
    static const uint8_t state = TM_STATE_FILE;

    for (uint64_t block = 0; block < blocks; block++)
        CHECK(pwrite(pool_fd, &state, 1, (off_t)(TM_STATES_OFFSET + block)) == 1, "states: %s",
              strerror(errno));
}

static void run_threads(uint64_t seed)
{
    void *(*others[])(void *) = {keeper, keeper, scanner};
    pthread_t threads[THREADS + 3];

    for (unsigned i = 0; i < THREADS + 3; i++)
        CHECK(pthread_create(&threads[i], NULL, i < THREADS ? worker : others[i - THREADS],
                             (void *)(uintptr_t)(seed << 8 | i)) == 0,
              "no thread");
    for (unsigned i = 0; i < THREADS + 3; i++)
        pthread_join(threads[i], NULL);
}

/* Return when no copy of a page of the source waits to be put, and nothing is being fetched. */
static void settle(void)
{
    while (atomic_load(&device->prefetch.ahead.n_runs) || tm_staged(device))
        sched_yield();
}

static void verify(int pool_fd)
{
    struct stat status;

    for (uint32_t number = 0; number < SPAN; number++)
        read_own(number);
    settle();
    CHECK(fstat(pool_fd, &status) == 0, "fstat: %s", strerror(errno));
    CHECK(atomic_load(&tm_counters(device)->used) == (uint64_t)status.st_blocks * 512,
          "used is %llu, tmpfs took %llu",
          (unsigned long long)atomic_load(&tm_counters(device)->used),
          (unsigned long long)status.st_blocks * 512);
}

/* What is counted by age follows from the index: whoever attaches counts the same. */
static void reopen(const struct tm_config *config)
{
    struct ages ages;

    memcpy(&ages, &device->ages, sizeof ages);
    tm_close(device);
    open_device(config);
    CHECK(memcmp(&ages, &device->ages, sizeof ages) == 0,
          "the counts by age are not those of the index");
}

int main(int argc, char **argv)
{
    CHECK(argc == 4, "usage: stress OPERATIONS SEED file|durable|handover|far|ram|cache");
    operations = strtoull(argv[1], NULL, 10);
    uint64_t seed = strtoull(argv[2], NULL, 10), size = (uint64_t)PAGES * TM_PAGE;
    bool is_cache = strcmp(argv[3], "cache") == 0;
    has_file = strcmp(argv[3], "ram") != 0;
    hands_over = strcmp(argv[3], "handover") == 0;
    is_far = strcmp(argv[3], "far") == 0;

    struct tm_layout layout;
    CHECK(tm_layout_for(size, &layout) == 0, "layout");
    minimum = layout.minimum;
    /* With a file, too little for all pages, so that puts are refused; without, enough, so that
     * retries end. */
    limit = minimum + (has_file ? size / 4 : 2 * size);
    int pool_fd = memory_file("pool", layout.data_offset + layout.data_bytes);
    CHECK(fallocate(pool_fd, 0, 0, (off_t)layout.index_offset) == 0, "header: %s", strerror(errno));
    control = mmap(NULL, TM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, pool_fd, TM_CONTROL_OFFSET);
    CHECK(control != MAP_FAILED, "mmap: %s", strerror(errno));
    set(&control->target, limit);
    file_fd = has_file ? memory_file("file", size) : -1;
    bitmap_fd = has_file && !is_cache ? memory_file("map", 2 * TM_PAGE) : -1;
    struct tm_config config = {
        .name = "stress",
        .pool_fd = pool_fd,
        .file_fd = file_fd,
        .bitmap_fd = bitmap_fd,
        .size = size,
        .limit = limit,
        .region = REGION,
        .file_bytes = has_file ? size : 0,
        .durable = strcmp(argv[3], "durable") == 0,
        .ephemeral = is_cache,
        .prefetch = TM_PREFETCH_YES,
    };

    struct local far;
    if (is_far) { /* it gives room back, as a neighbour's RAM does */
        CHECK(local_init(&far, file_fd, false, false) == 0, "far");
        far.store.trims = true;
        config.remote = &far.store;
    }

    if (has_file)
        lose_pool(pool_fd, layout.blocks);
    open_device(&config);
    run_threads(seed);
    CHECK(!hands_over || tm_write_through(device, false) == 0, "not handed back");
    CHECK(!has_file || atomic_load(&tm_counters(device)->promotions), "no page was promoted");
    CHECK(!has_file || atomic_load(&tm_counters(device)->prefetch_hits), "none was fetched ahead");
    set(&control->frozen, 0);
    verify(pool_fd);
    CHECK(!is_far || atomic_load(&device->statistics->remote.trims), "no trim was passed on");
    CHECK(!is_cache || atomic_load(&tm_counters(device)->demotions), "no page was evicted");
    reopen(&config);
    verify(pool_fd);
    tm_compact(device, UINT64_MAX);
    verify(pool_fd);
    tm_close(device);
    if (is_far)
        local_destroy(&far);
    munmap(control, TM_PAGE);
    puts("ok");
    return 0;
}
