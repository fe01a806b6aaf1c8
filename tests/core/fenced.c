/* SPDX-License-Identifier: BSD-3-Clause */
/* Beyond its fence a device does nothing to its file, and answers nothing; a fence that is put off
 * takes it back. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <time.h>

#include "fixture.h"

enum { PAGES = 4096, THROUGH = 0, PUT = 2000, SPILLED = 2100 };

static uint8_t content[TM_PAGE];
static _Atomic uint64_t fence;
static struct tm_device *device;
static _Atomic uint64_t done;

static uint64_t in_an_hour(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return ((uint64_t)now.tv_sec + 3600) * 1000000000;
}

static int write_page(uint64_t page, uint8_t byte)
{
    memset(content, byte, sizeof content);
    return tm_write(device, content, sizeof content, page * TM_PAGE, false);
}

static uint8_t byte_in(int fd, uint64_t page)
{
    uint8_t byte;
    CHECK(pread(fd, &byte, 1, (off_t)(page * TM_PAGE)) == 1);
    return byte;
}

static void test_nothing_passes_the_fence(const struct tm_config *config)
{
    uint8_t bits[TM_PAGE], before[TM_PAGE];
    uint64_t freed;
    for (uint64_t page = THROUGH; page <= PUT; page += PUT)
        CHECK(write_page(page, 1) == 0);
    CHECK(pread(config->bitmap_fd, before, sizeof before, TM_PAGE) == (ssize_t)sizeof before);
    tm_fence(device, 1);
    for (uint64_t page = THROUGH; page <= PUT; page += PUT) {
        CHECK(write_page(page, 2) == EIO);
        CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == EIO);
        CHECK(tm_zero(device, TM_PAGE, page * TM_PAGE, true) == EIO);
        CHECK(tm_trim(device, TM_PAGE, page * TM_PAGE, false) == EIO);
        CHECK(tm_cache(device, TM_PAGE, page * TM_PAGE) == EIO);
    }
    CHECK(tm_flush(device) == EIO);
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){0}, &freed) == EIO);
    CHECK(tm_drain(device) != 0);
    CHECK(file_sync(&device->file) == EIO);
    CHECK(pread(config->bitmap_fd, bits, sizeof bits, TM_PAGE) == (ssize_t)sizeof bits);
    CHECK(memcmp(bits, before, sizeof bits) == 0);
    CHECK(byte_in(config->file_fd, THROUGH) == 1 && byte_in(config->file_fd, PUT) == 0);
}

static void test_what_was_there_is_there_when_it_is_put_off(void)
{
    tm_fence(device, in_an_hour());
    for (uint64_t page = THROUGH; page <= PUT; page += PUT) {
        CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0 && content[0] == 1);
        CHECK(write_page(page, 3) == 0);
    }
    CHECK(!atomic_load(&device->counters->sync_failed));
    CHECK(tm_drain(device) == 0);
}

static void *write_until_refused(void *unused)
{
    (void)unused;
    while (write_page(SPILLED, 4) == 0)
        atomic_fetch_add(&done, 1);
    return NULL;
}

static void test_who_stops_it_has_the_last_word(void)
{
    pthread_t writer;
    CHECK(pthread_create(&writer, NULL, write_until_refused, NULL) == 0);
    while (atomic_load(&done) < 1000)
        ;
    CHECK(tm_stop(device) == 0);
    uint64_t then = atomic_load(&done);
    CHECK(tm_drain(device) == 0);
    CHECK(pthread_join(writer, NULL) == 0);
    CHECK(atomic_load(&done) <= then + 1); /* the last one was done, and not counted yet */
    CHECK(write_page(PUT, 5) == EIO);
    tm_go_on(device);
    CHECK(write_page(PUT, 5) == 0);
}

static void *set_fence(void *at)
{
    tm_fence(device, *(uint64_t *)at);
    return NULL;
}

/* What a read gives while somebody sets the fence. */
static int read_meanwhile(uint64_t at)
{
    pthread_t owner;
    tm_fence(device, TM_LEASE_LOST + 1); /* it is over, and may be renewed */
    CHECK(pthread_create(&owner, NULL, set_fence, &at) == 0);
    int error = tm_read(device, content, TM_PAGE, PUT * TM_PAGE);
    CHECK(pthread_join(owner, NULL) == 0);
    return error;
}

static void test_requests_wait_for_a_lease_that_may_be_renewed(void)
{
    tm_fence(device, TM_LEASE_LOST + 1);
    device->fence.wait_ns = 1;
    CHECK(tm_read(device, content, TM_PAGE, PUT * TM_PAGE) == EIO);
    device->fence.wait_ns = UINT64_C(3600) * 1000000000;
    CHECK(read_meanwhile(in_an_hour()) == 0 && content[0] == 5);
    CHECK(read_meanwhile(TM_LEASE_LOST) == EIO);
}

int main(void)
{
    struct tm_config config = config_of(PAGES, 1 << 20);
    fence = in_an_hour();
    config.fence = &fence;
    device = open_device(&config);
    test_nothing_passes_the_fence(&config);
    test_what_was_there_is_there_when_it_is_put_off();
    test_who_stops_it_has_the_last_word();
    test_requests_wait_for_a_lease_that_may_be_renewed();
    tm_close(device);
    puts("ok");
    return 0;
}
