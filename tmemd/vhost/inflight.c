/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "inflight.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static uint64_t bytes_of(const struct vhost_inflight_area *area)
{
    return area->n_queues * virtqueue_inflight_bytes(area->queue_size);
}

static bool is_possible(const struct vhost_inflight_area *area)
{
    return area->n_queues && area->n_queues <= VIRTQUEUES && area->queue_size <= VIRTQUEUE_MAX;
}

int inflight_make(struct vhost_inflight_area *area)
{
    if (!is_possible(area))
        return -1;
    area->bytes = bytes_of(area);
    area->offset = 0;
    int fd = memfd_create("tmem-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd >= 0 && ftruncate(fd, (off_t)area->bytes) == 0 &&
        fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

int inflight_set(struct inflight *inflight, const struct vhost_inflight_area *area, int fd)
{
    const struct vhost_region where = {.bytes = bytes_of(area), .offset = area->offset};
    inflight_clear(inflight);
    if (!is_possible(area) || area->offset % 64 || area->bytes < where.bytes)
        return EINVAL;
    inflight->n_queues = area->n_queues;
    inflight->queue_size = area->queue_size;
    return memory_map(&inflight->region, &where, fd, &inflight->lost);
}

void inflight_clear(struct inflight *inflight)
{
    memory_unmap(&inflight->region);
    inflight->lost = false;
}

bool inflight_find(const struct inflight *inflight, unsigned index, uint16_t size,
                   struct inflight_queue **found)
{
    uint8_t *base = inflight->region.base;
    *found = NULL;
    if (!base)
        return true;
    if (index >= inflight->n_queues || size > inflight->queue_size)
        return false;
    *found =
        (struct inflight_queue *)(base + index * virtqueue_inflight_bytes(inflight->queue_size));
    return true;
}
