/* SPDX-License-Identifier: BSD-3-Clause */
/* A split virtqueue (virtio 2.7) in the guest's memory, and what of it is in flight. One thread
 * takes requests out; those that answer them hold a lock (queue.h), and so does the first where
 * there is an inflight area.
 *
 * What the guest may change at any time is read once, into memory of our own, and checked there. */
#pragma once

#include <stdatomic.h>

#include "memory.h"

enum {
    VIRTQUEUES = 16,           /* of a device */
    VIRTQUEUE_MAX = 1024,      /* descriptors */
    VIRTQUEUE_SEGMENTS = 1024, /* parts of one request, after translation */
};

/* Virtio features of rings (virtio 6). */
#define VIRTIO_F_INDIRECT (UINT64_C(1) << 28)
#define VIRTIO_F_EVENT_IDX (UINT64_C(1) << 29)
#define VIRTIO_F_VERSION_1 (UINT64_C(1) << 32)

struct vring_descriptor;
struct vring_available;
struct vring_used;
struct inflight_queue;

struct virtqueue {
    /* Set before it runs. */
    const struct memory *memory;
    struct vring_descriptor *descriptors;
    struct vring_available *available;
    struct vring_used *used;
    struct inflight_queue *inflight; /* NULL: the front end keeps none */
    uint16_t size;
    bool has_indirect, has_event_index;
    /* Whoever takes requests out. */
    uint16_t next;       /* of `available`: the next to take */
    uint16_t n_resubmit; /* requests that the last process left in flight; they come first */
    uint16_t *resubmit;
    uint64_t n_taken; /* ever: the order for whoever comes after a crash */
    /* Whoever answers. */
    uint16_t used_index, signalled;
    bool has_signalled;
};

/* One request: what the guest reads and writes are asked from our side, so `out` is what we read.
 */
struct chain {
    uint16_t head;
    bool is_bad; /* part of it is no memory, or too much: only its last byte may be written */
    unsigned n_out, n_in;
    struct iovec parts[VIRTQUEUE_SEGMENTS]; /* n_out to read, then n_in to write */
};

/* Begin where `next` says, or where the last process stopped if there is an inflight area. Returns
 * 0 or an errno. */
int virtqueue_start(struct virtqueue *queue);
void virtqueue_stop(struct virtqueue *queue);

/* Take the next request. Returns 1, 0: there is none, or -1: the guest breaks the rules. */
int virtqueue_take(struct virtqueue *queue, struct chain *chain);
/* Whether there is one to take: a look at one word. */
bool virtqueue_has_more(const struct virtqueue *queue);
/* Ask to be kicked for the next one. True: it has come meanwhile. */
bool virtqueue_enable_kicks(struct virtqueue *queue);
void virtqueue_disable_kicks(struct virtqueue *queue);

/* Answer a request into which so many bytes were written. */
void virtqueue_answer(struct virtqueue *queue, uint16_t head, uint32_t written);
/* Whether the guest wants an interrupt for what was answered since the last time. */
bool virtqueue_wants_interrupt(struct virtqueue *queue);

/* Bytes of the rings of a queue, and how they must be aligned (virtio 2.7). */
uint64_t virtqueue_descriptors_bytes(uint16_t size);
uint64_t virtqueue_available_bytes(uint16_t size);
uint64_t virtqueue_used_bytes(uint16_t size);
enum { VIRTQUEUE_DESCRIPTORS_ALIGN = 16, VIRTQUEUE_AVAILABLE_ALIGN = 2, VIRTQUEUE_USED_ALIGN = 4 };

/* Bytes of the inflight area of one queue (vhost-user, 'Inflight I/O tracking'). */
uint64_t virtqueue_inflight_bytes(uint16_t size);
