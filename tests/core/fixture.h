/* SPDX-License-Identifier: BSD-3-Clause */
/* What the small programs share: a check that ends them, a configuration in memory, and freezing.
 */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static inline int memory_file(uint64_t size)
{
    int fd = memfd_create("tmem", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

/* A device of so many pages with a file and a bitmap, which may take `room` bytes of records beside
 * the least that it needs. */
static inline struct tm_config config_of(uint64_t pages, uint64_t room)
{
    struct tm_layout layout;
    uint64_t size = pages * TM_PAGE;
    CHECK(tm_layout_for(size, &layout) == 0);
    return (struct tm_config){
        .name = "test",
        .pool_fd = memory_file(layout.data_offset + layout.data_bytes),
        .file_fd = memory_file(size),
        .bitmap_fd = memory_file(2 * TM_PAGE),
        .size = size,
        .limit = layout.minimum + room,
        .region = 1 << 20,
        .file_bytes = size,
    };
}

static inline struct tm_device *open_device(const struct tm_config *config)
{
    struct tm_device *device;
    char error[256];
    CHECK(tm_open(config, &device, error, sizeof error) == 0);
    return device;
}

/* Have puts refused, or accepted again, as whoever controls the pool would. */
static inline void freeze(struct tm_device *device, uint64_t frozen)
{
    struct tm_control *control = (struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    atomic_store(&control->frozen.value, frozen);
    atomic_store(&control->frozen.complement, ~frozen);
}
