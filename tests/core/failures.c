/* SPDX-License-Identifier: BSD-3-Clause */
/* A request that fails half-way says so, whatever succeeds after. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>

#include "bounce.h"
#include "fixture.h"

enum { PAGES = 2048, PAGE = 600, ROOM = 64 << 20 };

static struct tm_device *device;
static unsigned n_failing; /* writes that will fail, the first ones */
static void (*amid_write)(void);

/* Buffers that are in use. */
static _Atomic int n_bounces;

struct bounce *__real_bounce_get(void);
struct bounce *__wrap_bounce_get(void);
struct bounce *__wrap_bounce_get(void)
{
    n_bounces++;
    return __real_bounce_get();
}

void __real_bounce_put(struct bounce *bounce);
void __wrap_bounce_put(struct bounce *bounce);
void __wrap_bounce_put(struct bounce *bounce)
{
    n_bounces--;
    __real_bounce_put(bounce);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    if (n_failing && fd == device->file.local.fd) {
        errno = EOPNOTSUPP;
        return -1;
    }
    return (int)syscall(SYS_fallocate, fd, mode, offset, length);
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    void (*work)(void) = amid_write;
    amid_write = NULL;
    if (n_failing) {
        n_failing--;
        errno = EIO;
        return -1;
    }
    ssize_t put = syscall(SYS_pwrite64, fd, buffer, length, offset);
    if (work)
        work();
    return put;
}

static bool syncs_fail;
static int failing_fd = -1;   /* a file of which they do, */
static unsigned n_good_syncs; /* but for the first ones */

int fdatasync(int fd)
{
    errno = EIO;
    bool fails = syncs_fail || (fd == failing_fd && n_good_syncs-- == 0);
    return fails ? -1 : (int)syscall(SYS_fdatasync, fd);
}

/* The whole pages cannot be zeroed, the part behind them could. */
static void test_zeroing(void)
{
    uint8_t content[3 * TM_PAGE];
    struct tm_config config = config_of(PAGES, ROOM);
    config.durable = true;
    device = open_device(&config);
    memset(content, 7, sizeof content);
    CHECK(tm_write(device, content, sizeof content, PAGE * TM_PAGE, false) == 0);
    n_failing = 1;
    CHECK(tm_zero(device, 2 * TM_PAGE + 100, PAGE * TM_PAGE, false) == EIO);
    CHECK(tm_zero(device, 2 * TM_PAGE + 100, PAGE * TM_PAGE, false) == 0);
    tm_close(device);
}

/* As many pages as one write takes fail together, and are what they were. */
static void test_overwriting(void)
{
    static uint8_t content[TM_RUN_MAX * TM_PAGE], found[TM_RUN_MAX * TM_PAGE];
    struct tm_config config = config_of(PAGES, ROOM);
    config.durable = true;
    device = open_device(&config);
    memset(found, 7, sizeof found);
    CHECK(tm_write(device, found, sizeof found, PAGE * TM_PAGE, false) == 0);
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &(uint64_t){0}) == 0);
    memset(content, 8, sizeof content);
    n_failing = 1;
    CHECK(tm_write(device, content, sizeof content, PAGE * TM_PAGE, false) == EIO);
    CHECK(tm_read(device, content, sizeof content, PAGE * TM_PAGE) == 0);
    CHECK(memcmp(content, found, sizeof found) == 0);
    tm_close(device);
}

/* The region is cleaned while a page is spilled, and its bit cannot be set again. */
static void clean_region(void)
{
    atomic_store(&device->bitmap.regions[PAGE / device->bitmap.region_pages], BITMAP_CLEAN);
    n_failing = 1;
}

static void test_spilling(void)
{
    uint8_t content[TM_PAGE];
    struct tm_config config = config_of(PAGES, ROOM);
    device = open_device(&config);
    memset(content, 7, sizeof content);
    freeze(device, 1);
    CHECK(tm_write(device, "x", 1, PAGE * TM_PAGE, false) == 0); /* sets the bit */
    amid_write = clean_region;
    CHECK(tm_write(device, content, TM_PAGE, PAGE * TM_PAGE, false) != 0);
    CHECK(n_failing == 0 && tm_write(device, content, TM_PAGE, PAGE * TM_PAGE, false) == 0);
    tm_close(device);
}

/* A put of less than a page sets its region's bit, too, and is refused where that cannot be synced.
 */
static void test_bits(void)
{
    struct tm_config config = config_of(PAGES, ROOM);
    device = open_device(&config);
    CHECK(!bitmap_region_is_set(&device->bitmap, PAGE / device->bitmap.region_pages));
    syncs_fail = true;
    CHECK(tm_write(device, "x", 1, PAGE * TM_PAGE, false) != 0);
    syncs_fail = false;
    CHECK(tm_write(device, "x", 1, PAGE * TM_PAGE, false) == 0);
    CHECK(bitmap_region_is_set(&device->bitmap, PAGE / device->bitmap.region_pages));
    tm_close(device);
}

/* A handover ends where its bits, which are clear by now, cannot be synced: the next put sets its
 * own again. */
static void test_a_handover_that_fails_at_its_end(void)
{
    uint8_t bits = 0;
    struct tm_config config = config_of(PAGES, ROOM);
    device = open_device(&config);
    CHECK(tm_write(device, "x", 1, PAGE * TM_PAGE, false) == 0);
    failing_fd = config.bitmap_fd;
    n_good_syncs = 1; /* when what is there was cleaned */
    CHECK(tm_write_through(device, true) != 0);
    failing_fd = -1;
    CHECK(pread(config.bitmap_fd, &bits, 1, TM_PAGE) == 1 && bits == 0);
    CHECK(tm_write(device, "y", 1, PAGE * TM_PAGE, false) == 0);
    CHECK(pread(config.bitmap_fd, &bits, 1, TM_PAGE) == 1);
    CHECK(bits == 1 << PAGE / device->bitmap.region_pages);
    tm_close(device);
}

static pthread_t other;

static void *flush(void *unused)
{
    CHECK(tm_flush(device) == 0);
    return unused;
}

/* It has the time to see that the page is stale still. */
static void flush_meanwhile(void)
{
    CHECK(pthread_create(&other, NULL, flush, NULL) == 0);
    for (int i = 0; i < 20000; i++)
        sched_yield();
}

/* Two FLUSHes at the same time write again what a failed write left stale, and count it as done
 * once. */
static void test_two_flushes(void)
{
    uint8_t content[TM_PAGE];
    struct tm_config config = config_of(PAGES, ROOM);
    config.durable = true;
    device = open_device(&config);
    memset(content, 7, sizeof content);
    CHECK(tm_write(device, content, TM_PAGE, PAGE * TM_PAGE, false) == 0);
    n_failing = 1;
    CHECK(tm_write(device, content, TM_PAGE, PAGE * TM_PAGE, false) == EIO);
    CHECK(atomic_load(&device->stale) == 1);
    amid_write = flush_meanwhile;
    CHECK(tm_flush(device) == 0 && pthread_join(other, NULL) == 0);
    CHECK(atomic_load(&device->stale) == 0);
    tm_close(device);
}

int main(void)
{
    test_bits();
    test_a_handover_that_fails_at_its_end();
    test_two_flushes();
    test_zeroing();
    test_overwriting();
    test_spilling();
    CHECK(n_bounces == 0);
    puts("ok");
    return 0;
}
