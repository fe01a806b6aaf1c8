/* SPDX-License-Identifier: BSD-3-Clause */
/* The driver's side of a split virtqueue (virtio 1.2, 2.7) of block requests (5.2.6). */
#pragma once

#include <linux/virtio_blk.h>
#include <linux/virtio_ring.h>
#include <stdbool.h>
#include <stdint.h>

#include "door.h"
#include "memory.h"

enum { PARTS = 3 }; /* of a request: header, data, status */

/* What the device sees of one request beside its data: two cache lines, shared with no other, as a
 * Linux guest has them. */
struct block_request {
    struct vring_desc table[PARTS];
    uint64_t padding[2];
    struct virtio_blk_outhdr header;
    struct virtio_blk_discard_write_zeroes range;
    uint8_t status;
} __attribute__((aligned(64)));

struct ring {
    const struct memory *memory;
    struct vring_desc *descriptors;
    struct vring_avail *available;
    struct vring_used *used;
    struct block_request *blocks;
    struct request *requests[MAX_DEPTH]; /* by their place in this ring */
    unsigned size;                       /* descriptors */
    bool event_idx, indirect;
    uint16_t added, kicked, reaped; /* free-running: of the available ring, of the used ring */
    int kick, call;                 /* eventfds */
};

void ring_open(struct ring *ring, struct memory *memory, unsigned depth);
void ring_add(struct ring *ring, unsigned place, struct request *request);
/* Show the device what was added, and kick it where it asks for that, or in any case. */
void ring_push(struct ring *ring, bool in_any_case);
/* Requests that the device has finished since the last call. */
unsigned ring_reap(struct ring *ring, struct request **finished);
/* Ask for an interrupt at the next one finished, and say whether there is none yet. */
bool ring_arm(struct ring *ring);
/* Ask for no interrupts. */
void ring_disarm(struct ring *ring);
