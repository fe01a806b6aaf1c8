/* A drain leaves no region's bit set that the file holds, even if part of a page could not be
 * written before. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

enum { PAGES = 2048, PAGE = 600 }; /* one that is not written through */

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static struct tm_device *device;
static struct tm_config config;
static bool armed;

static int memory_file(uint64_t size)
{
    int fd = memfd_create("drained", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

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

static void freeze(bool frozen)
{
    struct tm_checked word = {frozen, ~(uint64_t)frozen};
    off_t at = TM_CONTROL_OFFSET + (off_t)offsetof(struct tm_control, frozen);
    CHECK(pwrite(config.pool_fd, &word, sizeof word, at) == sizeof word);
}

int main(void)
{
    struct tm_layout layout;
    char error[256];
    uint8_t content[TM_PAGE] = {1};
    CHECK(tm_layout_for((uint64_t)PAGES * TM_PAGE, &layout) == 0);
    int bitmap = memory_file(2 * TM_PAGE);
    config = (struct tm_config){
        .name = "drained",
        .pool_fd = memory_file(layout.data_offset + layout.data_bytes),
        .file_fd = memory_file((uint64_t)PAGES * TM_PAGE),
        .file_bytes = (uint64_t)PAGES * TM_PAGE,
        .bitmap_fd = fcntl(bitmap, F_DUPFD_CLOEXEC, 0),
        .region = 2 << 20,
        .size = (uint64_t)PAGES * TM_PAGE,
        .limit = layout.minimum,
    };
    CHECK(config.bitmap_fd >= 0 && tm_open(&config, &device, error, sizeof error) == 0);

    freeze(true);
    armed = true;
    CHECK(tm_write(device, content, 512, (uint64_t)PAGE * TM_PAGE, false) != 0 && !armed &&
          regions_set() == 0);

    CHECK(dup2(bitmap, config.bitmap_fd) == config.bitmap_fd);
    freeze(false);
    CHECK(tm_write(device, content, TM_PAGE, (uint64_t)(PAGE + 1) * TM_PAGE, false) == 0 &&
          regions_set() == 1);
    CHECK(tm_drain(device) == 0 && regions_set() == 0);
    tm_close(device);
    puts("ok");
    return 0;
}
