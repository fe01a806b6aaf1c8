/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tmem.h"

static bool adds_up(uint64_t start, uint64_t bytes)
{
    uint64_t end;
    return bytes && !__builtin_add_overflow(start, bytes, &end) && end <= INT64_MAX;
}

/* A file that is too short faults later: this finds mistakes, memory.lost malice. */
static bool is_long_enough(int fd, uint64_t end)
{
    struct stat status;
    return fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && (uint64_t)status.st_size >= end;
}

int memory_map(struct region *region, const struct vhost_region *where, int fd, _Atomic bool *lost)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), before = where->offset % page;
    if (!adds_up(where->offset, where->bytes) || !is_long_enough(fd, where->offset + where->bytes))
        return EINVAL;
    region->where = *where;
    region->mapped_bytes = where->bytes + before;
    region->mapped = mmap(NULL, region->mapped_bytes, PROT_READ | PROT_WRITE,
                          MAP_SHARED | MAP_NORESERVE, fd, (off_t)(where->offset - before));
    if (region->mapped == MAP_FAILED)
        return errno;
    madvise(region->mapped, region->mapped_bytes, MADV_DONTDUMP); /* a guest's secrets */
    int error = tm_watch_mapping(region->mapped, region->mapped_bytes, lost);
    if (error)
        munmap(region->mapped, region->mapped_bytes);
    else
        region->base = (uint8_t *)region->mapped + before;
    return error;
}

void memory_unmap(struct region *region)
{
    if (region->base) {
        tm_forget_mapping(region->mapped);
        munmap(region->mapped, region->mapped_bytes);
    }
    region->base = NULL;
}

static int add(struct memory *memory, const struct vhost_region *where, int fd)
{
    if (!adds_up(where->guest, where->bytes) || where->user + where->bytes < where->user)
        return EINVAL;
    int error = memory_map(&memory->regions[memory->n], where, fd, &memory->lost);
    memory->n += !error;
    return error;
}

int memory_set(struct memory *memory, const struct vhost_message *message)
{
    const struct vhost_memory_table *table = &message->payload.memory;
    memory_clear(memory);
    if (message->size < sizeof table->n + sizeof table->padding || table->n > VHOST_MAX_REGIONS ||
        table->n != message->n_fds || message->size < 8 + table->n * sizeof *table->regions)
        return EINVAL;
    int error = 0;
    uint64_t left = MEMORY_MAX;
    for (uint32_t i = 0; i < table->n && !error; i++) {
        const struct vhost_region *where = &table->regions[i];
        error = where->bytes > left ? EFBIG : add(memory, where, message->fds[i]);
        left -= where->bytes;
    }
    if (error)
        memory_clear(memory);
    return error;
}

void memory_clear(struct memory *memory)
{
    for (unsigned i = 0; i < memory->n; i++)
        memory_unmap(&memory->regions[i]);
    memory->n = 0;
    memory->lost = false;
}

void *memory_of_user(const struct memory *memory, uint64_t address, uint64_t bytes, unsigned align)
{
    for (unsigned i = 0; i < memory->n; i++) {
        const struct region *region = &memory->regions[i];
        uint64_t from = address - region->where.user;
        if (from < region->where.bytes && bytes <= region->where.bytes - from &&
            (uintptr_t)(region->base + from) % align == 0)
            return region->base + from;
    }
    return NULL;
}

/* The memory from a guest's address on, as far as one region goes. */
static struct iovec first_part(const struct memory *memory, uint64_t address, uint32_t bytes)
{
    for (unsigned i = 0; i < memory->n; i++) {
        const struct region *region = &memory->regions[i];
        uint64_t from = address - region->where.guest;
        if (from < region->where.bytes) {
            uint64_t left = region->where.bytes - from;
            return (struct iovec){region->base + from, left < bytes ? left : bytes};
        }
    }
    return (struct iovec){0};
}

unsigned memory_of_guest(const struct memory *memory, uint64_t address, uint32_t bytes,
                         struct iovec *parts, unsigned most)
{
    unsigned n = 0;
    while (bytes && n < most) {
        parts[n] = first_part(memory, address, bytes);
        if (!parts[n].iov_len)
            return 0;
        address += parts[n].iov_len;
        bytes -= (uint32_t)parts[n++].iov_len;
    }
    return bytes ? 0 : n;
}
