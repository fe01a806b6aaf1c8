/* SPDX-License-Identifier: BSD-3-Clause */
/* Two requests set neighbouring bits of the write-intent bitmap at the same time, and neither
 * writes over the other's. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>

#include "bitmap.h"
#include "fixture.h"

enum { PAGES = 2048, PATIENCE = 20000 };

static struct tm_device *device;
static pthread_t other;
static _Atomic bool is_other_done, is_begun;

static uint64_t region_pages(void) { return device->bitmap.region_pages; }

static void put_in_region(uint64_t region)
{
    uint8_t content[TM_PAGE] = {1};
    /* Not a page that blkid reads: those are written through. */
    uint64_t page = (region + 1) * region_pages() - 1;
    CHECK(tm_write(device, content, TM_PAGE, page * TM_PAGE, false) == 0);
}

static void *put_in_next(void *unused)
{
    put_in_region(3);
    atomic_store(&is_other_done, true);
    return unused;
}

/* The first write of bits is slow: another request has all the time that it needs to pass it. */
ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    if (device && fd == device->bitmap.local.fd && !atomic_exchange(&is_begun, true)) {
        CHECK(pthread_create(&other, NULL, put_in_next, NULL) == 0);
        for (int i = 0; i < PATIENCE && !atomic_load(&is_other_done); i++)
            sched_yield();
    }
    return syscall(SYS_pwrite64, fd, buffer, length, offset);
}

int main(void)
{
    struct tm_config config = config_of(PAGES, 64 << 20);
    uint8_t bits = 0;
    CHECK((device = open_device(&config)));
    put_in_region(2);
    CHECK(pthread_join(other, NULL) == 0);
    CHECK(pread(config.bitmap_fd, &bits, 1, BITMAP_BITS_OFFSET) == 1);
    CHECK(__builtin_popcount(bits) >= 2);
    tm_close(device);
    puts("ok");
    return 0;
}
