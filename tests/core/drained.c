/* SPDX-License-Identifier: BSD-3-Clause */
/* A drain leaves no region's bit set that the file holds, even if part of a page could not be
 * written before. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <fcntl.h>

#include "fixture.h"

enum { PAGES = 2048, PAGE = 600 }; /* one that is not written through */

static struct tm_device *device;
static struct tm_config config;
static bool armed;

static uint64_t regions_set(void) { return atomic_load(&tm_counters(device)->regions_set); }

void __real_lock_io(struct locks *locks, struct io_range *io);
void __wrap_lock_io(struct locks *locks, struct io_range *io);

/* The put of the part was refused; before it goes to the file another thread drains, and then the
 * bitmap fails. */
void __wrap_lock_io(struct locks *locks, struct io_range *io)
{
    __real_lock_io(locks, io);
    if (!armed)
        return;
    armed = false;
    CHECK(tm_drain(device) == 0 && regions_set() == 0);
    int unwritable = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK(unwritable >= 0 && dup2(unwritable, config.bitmap_fd) == config.bitmap_fd &&
          close(unwritable) == 0);
}

int main(void)
{
    uint8_t content[TM_PAGE] = {1};
    config = config_of(PAGES, 0);
    int bitmap = fcntl(config.bitmap_fd, F_DUPFD_CLOEXEC, 0);
    CHECK(bitmap >= 0);
    device = open_device(&config);

    freeze(device, 1);
    armed = true;
    CHECK(tm_write(device, content, 512, (uint64_t)PAGE * TM_PAGE, false) != 0 && !armed &&
          regions_set() == 0);

    CHECK(dup2(bitmap, config.bitmap_fd) == config.bitmap_fd);
    freeze(device, 0);
    CHECK(tm_write(device, content, TM_PAGE, (uint64_t)(PAGE + 1) * TM_PAGE, false) == 0 &&
          regions_set() == 1);
    CHECK(tm_drain(device) == 0 && regions_set() == 0);
    tm_close(device);
    puts("ok");
    return 0;
}
