/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common.h"

enum { ALIGNMENT = 4096 };

void memory_open(struct memory *memory, size_t size)
{
    memory->size = size;
    memory->used = 0;
    memory->fd = memfd_create("guest", MFD_CLOEXEC);
    if (memory->fd < 0 || ftruncate(memory->fd, size) < 0)
        die("memfd", strerror(errno));
    memory->base = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory->fd, 0);
    if (memory->base == MAP_FAILED)
        die("mmap", strerror(errno));
}

void *memory_take(struct memory *memory, size_t bytes)
{
    size_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    if (rounded > memory->size - memory->used)
        die("memory", "too small");
    memory->used += rounded;
    return memory->base + memory->used - rounded;
}

uint64_t guest_address(const struct memory *memory, const void *pointer)
{
    return GUEST_BASE + ((const uint8_t *)pointer - memory->base);
}
