/* No buffer can be had: what needs one fails with ENOMEM, changes nothing and is right when there
 * is memory again. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "clean.h"
#include "overwrite.h"

enum { PAGES = 2048, PAGE = 600, LIMIT = 64 << 20 };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static bool short_of_memory;

struct bounce *__real_bounce_get(void);
struct bounce *__wrap_bounce_get(void);
struct bounce *__wrap_bounce_get(void) { return short_of_memory ? NULL : __real_bounce_get(); }

static int memory_file(uint64_t size)
{
    int fd = memfd_create("shortage", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static void freeze(struct tm_control *control, uint64_t frozen)
{
    atomic_store(&control->frozen.value, frozen);
    atomic_store(&control->frozen.complement, ~frozen);
}

int main(void)
{
    struct tm_layout layout;
    struct tm_device *device;
    char error[256];
    uint8_t old[TM_PAGE], new[TM_PAGE], content[TM_PAGE];
    const uint64_t size = (uint64_t)PAGES * TM_PAGE, at = (uint64_t)PAGE * TM_PAGE;
    uint64_t freed;
    for (size_t i = 0; i < TM_PAGE; i++) {
        old[i] = (uint8_t)rand();
        new[i] = (uint8_t)rand();
    }
    CHECK(tm_layout_for(size, &layout) == 0);
    struct tm_config config = {
        .name = "shortage",
        .pool_fd = memory_file(layout.data_offset + layout.data_bytes),
        .file_fd = memory_file(size),
        .bitmap_fd = memory_file(2 * TM_PAGE),
        .size = size,
        .limit = LIMIT,
        .region = 1 << 20,
        .file_bytes = size,
    };
    CHECK(tm_open(&config, &device, error, sizeof error) == 0);
    struct tm_control *control =
        mmap(NULL, TM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, config.pool_fd, TM_CONTROL_OFFSET);
    CHECK(control != MAP_FAILED);

    CHECK(tm_write(device, old, TM_PAGE, at, false) == 0);
    short_of_memory = true;
    CHECK(tm_demote(device, TM_PAGE, (struct tm_filter){0}, &freed) == ENOMEM && !freed);
    CHECK(tm_drain(device) == ENOMEM);
    short_of_memory = false;
    CHECK(tm_drain(device) == 0);

    short_of_memory = true;
    CHECK(tm_read(device, content, TM_PAGE, at) == ENOMEM);
    CHECK(tm_write(device, "x", 1, at + 5, false) == ENOMEM);
    CHECK(tm_write(device, old, TM_PAGE, 0, false) == ENOMEM); /* written through */
    freeze(control, 1);
    CHECK(tm_write(device, new, TM_PAGE, at, false) == ENOMEM); /* a spill */
    short_of_memory = false;
    CHECK(tm_read(device, content, TM_PAGE, at) == 0 && memcmp(content, old, TM_PAGE) == 0);
    CHECK(tm_read(device, content, 1, 0) == 0 && content[0] == 0);
    CHECK(tm_write(device, new, TM_PAGE, at, false) == 0);
    CHECK(tm_read(device, content, TM_PAGE, at) == 0 && memcmp(content, new, TM_PAGE) == 0);

    munmap(control, TM_PAGE);
    tm_close(device);
    puts("ok");
    return 0;
}
