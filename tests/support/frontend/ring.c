/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common.h"

enum { SECTOR = 512, SMALLEST = 128 };

/* 2.7.7.2, 2.7.8: where a ring keeps its event index depends on its size. */
static uint16_t *used_event(struct ring *ring) { return &ring->available->ring[ring->size]; }
static uint16_t *avail_event(struct ring *ring)
{
    return (uint16_t *)&ring->used->ring[ring->size];
}

void ring_open(struct ring *ring, struct memory *memory, unsigned depth)
{
    ring->memory = memory;
    ring->size = SMALLEST;
    while (ring->size < PARTS * depth)
        ring->size *= 2;
    ring->descriptors = memory_take(memory, ring->size * sizeof *ring->descriptors);
    ring->available = memory_take(memory, sizeof *ring->available + (ring->size + 1) * 2);
    ring->used =
        memory_take(memory, sizeof *ring->used + ring->size * sizeof *ring->used->ring + 2);
    ring->blocks = memory_take(memory, depth * sizeof *ring->blocks);
    ring->kick = eventfd(0, EFD_CLOEXEC);
    ring->call = eventfd(0, EFD_CLOEXEC);
    if (ring->kick < 0 || ring->call < 0)
        die("eventfd", strerror(errno));
}

static struct vring_desc part(const struct ring *ring, const void *data, uint32_t length,
                              uint16_t flags, uint16_t next)
{
    return (struct vring_desc){guest_address(ring->memory, data), length, flags, next};
}

/* 5.2.6: the header, what it is about, and a byte for the device's answer. */
static void describe(struct ring *ring, struct block_request *block, struct request *request,
                     struct vring_desc *table, uint16_t first)
{
    static const uint32_t types[] = {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES};
    uint64_t sector = request->offset / SECTOR;
    bool zero = request->operation == OP_ZERO;

    block->header.type = types[request->operation];
    block->header.sector = zero ? 0 : sector;
    block->status = 0xff;
    table[0] = part(ring, &block->header, sizeof block->header, VRING_DESC_F_NEXT, first + 1);
    table[1] = part(ring, request->data, request->length, VRING_DESC_F_NEXT, first + 2);
    table[2] = part(ring, &block->status, sizeof block->status, VRING_DESC_F_WRITE, 0);
    if (request->operation == OP_READ)
        table[1].flags |= VRING_DESC_F_WRITE;
    if (zero) {
        block->range.sector = sector;
        block->range.num_sectors = request->length / SECTOR;
        block->range.flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
        table[1] = part(ring, &block->range, sizeof block->range, VRING_DESC_F_NEXT, first + 2);
    }
}

void ring_add(struct ring *ring, unsigned place, struct request *request)
{
    struct block_request *block = &ring->blocks[place];
    unsigned head = ring->indirect ? place : PARTS * place;

    ring->requests[place] = request;
    if (ring->indirect) {
        describe(ring, block, request, block->table, 0);
        ring->descriptors[head] =
            part(ring, block->table, sizeof block->table, VRING_DESC_F_INDIRECT, 0);
    } else {
        describe(ring, block, request, &ring->descriptors[head], head);
    }
    ring->available->ring[ring->added++ & (ring->size - 1)] = head;
}

/* 2.7.13.4: the index must be seen before the device is asked whether it wants to be told. */
void ring_push(struct ring *ring, bool in_any_case)
{
    uint16_t before = ring->kicked;
    bool wanted;

    if (ring->added == before && !in_any_case)
        return;
    __atomic_store_n(&ring->available->idx, ring->added, __ATOMIC_RELEASE);
    atomic_thread_fence(memory_order_seq_cst);
    ring->kicked = ring->added;
    if (ring->event_idx)
        wanted = vring_need_event(__atomic_load_n(avail_event(ring), __ATOMIC_RELAXED), ring->added,
                                  before);
    else
        wanted = !(__atomic_load_n(&ring->used->flags, __ATOMIC_RELAXED) & VRING_USED_F_NO_NOTIFY);
    if ((wanted || in_any_case) && eventfd_write(ring->kick, 1) < 0)
        die("kick", strerror(errno));
}

static struct request *finished_by(struct ring *ring, uint32_t head)
{
    unsigned place = ring->indirect ? head : head / PARTS;
    struct request *request = place < MAX_DEPTH ? ring->requests[place] : NULL;

    if (!request)
        die("used ring", "a request that is not in flight");
    ring->requests[place] = NULL;
    request->failed = ring->blocks[place].status != VIRTIO_BLK_S_OK;
    return request;
}

unsigned ring_reap(struct ring *ring, struct request **finished)
{
    uint16_t index = __atomic_load_n(&ring->used->idx, __ATOMIC_ACQUIRE);
    unsigned n = 0;

    while (ring->reaped != index)
        finished[n++] = finished_by(ring, ring->used->ring[ring->reaped++ & (ring->size - 1)].id);
    return n;
}

bool ring_arm(struct ring *ring)
{
    __atomic_store_n(used_event(ring), ring->reaped, __ATOMIC_RELAXED);
    atomic_thread_fence(memory_order_seq_cst);
    return __atomic_load_n(&ring->used->idx, __ATOMIC_RELAXED) == ring->reaped;
}

/* An event index just behind is passed by no step shorter than the whole 16 bits. */
void ring_disarm(struct ring *ring)
{
    ring->available->flags = VRING_AVAIL_F_NO_INTERRUPT;
    __atomic_store_n(used_event(ring), (uint16_t)(ring->reaped - 1), __ATOMIC_RELAXED);
}
