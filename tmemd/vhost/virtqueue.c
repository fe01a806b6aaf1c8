/* SPDX-License-Identifier: BSD-3-Clause */
#include "virtqueue.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* virtio 2.7.5 to 2.7.8. Little-endian, as this machine is. */
enum { DESCRIPTOR_NEXT = 1, DESCRIPTOR_WRITE = 2, DESCRIPTOR_INDIRECT = 4 };
enum { NO_INTERRUPT = 1, NO_NOTIFY = 1 };

struct vring_descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

struct vring_available {
    uint16_t flags, index, ring[]; /* and behind the ring: of which answer to be told */
};

struct vring_used_element {
    uint32_t head, written;
};

struct vring_used {
    uint16_t flags, index;
    struct vring_used_element ring[]; /* and behind the ring: of which request to be told */
};

/* vhost-user, 'Inflight I/O tracking', of split virtqueues. */
enum { INFLIGHT_VERSION = 1 };

struct inflight_descriptor {
    uint8_t inflight, padding[5];
    uint16_t next; /* in a list of those that were answered together; ours hold one */
    uint64_t counter;
};

struct inflight_queue {
    uint64_t features;
    uint16_t version, size, last_batch_head, used_index;
    struct inflight_descriptor descriptors[];
};

static uint16_t load16(const uint16_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store16(uint16_t *word, uint16_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

uint64_t virtqueue_descriptors_bytes(uint16_t size)
{
    return (uint64_t)size * sizeof(struct vring_descriptor);
}

uint64_t virtqueue_available_bytes(uint16_t size)
{
    return sizeof(struct vring_available) + (size + UINT64_C(1)) * sizeof(uint16_t);
}

uint64_t virtqueue_used_bytes(uint16_t size)
{
    return sizeof(struct vring_used) + (uint64_t)size * sizeof(struct vring_used_element) +
           sizeof(uint16_t);
}

uint64_t virtqueue_inflight_bytes(uint16_t size)
{
    uint64_t bytes =
        sizeof(struct inflight_queue) + (uint64_t)size * sizeof(struct inflight_descriptor);
    return (bytes + 63) / 64 * 64;
}

static uint16_t *used_event(const struct virtqueue *queue)
{
    return &queue->available->ring[queue->size];
}

static uint16_t *available_event(const struct virtqueue *queue)
{
    return (uint16_t *)&queue->used->ring[queue->size];
}

/* What was begun and not answered, the last first: they are taken from the end. */
static int by_counter(const void *one, const void *other)
{
    uint64_t a = ((const struct inflight_descriptor *)one)->counter,
             b = ((const struct inflight_descriptor *)other)->counter;
    return a < b ? 1 : a > b ? -1 : 0;
}

/* Find what the last process left unanswered. What is in the area is copied: it is shared. */
static int resume(struct virtqueue *queue)
{
    struct inflight_queue *inflight = queue->inflight;
    struct inflight_descriptor *left = calloc(queue->size, sizeof *left);
    queue->resubmit = calloc(queue->size, sizeof *queue->resubmit);
    if (!left || !queue->resubmit) {
        free(left);
        return ENOMEM;
    }
    uint16_t last = load16(&inflight->last_batch_head);
    if (load16(&inflight->used_index) != queue->used_index && last < queue->size)
        __atomic_store_n(&inflight->descriptors[last].inflight, 0, __ATOMIC_RELEASE);
    for (uint16_t head = 0; head < queue->size; head++) {
        if (!__atomic_load_n(&inflight->descriptors[head].inflight, __ATOMIC_ACQUIRE))
            continue;
        left[queue->n_resubmit].next = head;
        left[queue->n_resubmit++].counter =
            __atomic_load_n(&inflight->descriptors[head].counter, __ATOMIC_RELAXED);
    }
    qsort(left, queue->n_resubmit, sizeof *left, by_counter);
    for (uint16_t i = 0; i < queue->n_resubmit; i++)
        queue->resubmit[i] = left[i].next;
    queue->n_taken = queue->n_resubmit ? left[0].counter + 1 : 0;
    queue->next = (uint16_t)(queue->used_index + queue->n_resubmit);
    free(left);
    return 0;
}

int virtqueue_start(struct virtqueue *queue)
{
    struct inflight_queue *inflight = queue->inflight;
    queue->n_resubmit = 0;
    queue->resubmit = NULL;
    queue->n_taken = 0;
    queue->used_index = load16(&queue->used->index);
    queue->has_signalled = false;
    if (!inflight)
        return 0;
    int error = inflight->version == INFLIGHT_VERSION ? resume(queue) : 0;
    inflight->version = INFLIGHT_VERSION;
    inflight->size = queue->size;
    store16(&inflight->used_index, queue->used_index);
    return error;
}

void virtqueue_stop(struct virtqueue *queue)
{
    free(queue->resubmit);
    queue->resubmit = NULL;
}

/* In two words, each read once: the guest may change it meanwhile. */
static struct vring_descriptor copy(const struct vring_descriptor *descriptor)
{
    union {
        uint64_t words[2];
        struct vring_descriptor descriptor;
    } copied;
    const uint64_t *words = (const uint64_t *)descriptor;
    copied.words[0] = __atomic_load_n(&words[0], __ATOMIC_RELAXED);
    copied.words[1] = __atomic_load_n(&words[1], __ATOMIC_RELAXED);
    return copied.descriptor;
}

/* Add what a descriptor tells of. Returns 1; 0: it is no memory; -1: there are too many, or they
 * come in the wrong order (virtio 2.7.4.2). */
static int add(const struct virtqueue *queue, struct chain *chain,
               const struct vring_descriptor *descriptor)
{
    unsigned n = chain->n_out + chain->n_in;
    bool is_in = descriptor->flags & DESCRIPTOR_WRITE;
    if (n == VIRTQUEUE_SEGMENTS || (!is_in && chain->n_in))
        return -1;
    if (!descriptor->length)
        return 1;
    unsigned parts = memory_of_guest(queue->memory, descriptor->address, descriptor->length,
                                     chain->parts + n, VIRTQUEUE_SEGMENTS - n);
    *(is_in ? &chain->n_in : &chain->n_out) += parts;
    return parts > 0;
}

/* Copy an indirect table. Returns how many descriptors it holds, or 0: it is none. */
static uint16_t copy_table(const struct virtqueue *queue, const struct vring_descriptor *where,
                           struct vring_descriptor *table)
{
    struct iovec parts[2];
    uint32_t bytes = where->length, from = 0;
    if (!queue->has_indirect || where->flags & DESCRIPTOR_NEXT || !bytes || bytes % sizeof *table ||
        bytes / sizeof *table > VIRTQUEUE_MAX)
        return 0;
    unsigned n = memory_of_guest(queue->memory, where->address, bytes, parts, 2);
    for (unsigned i = 0; i < n; from += (uint32_t)parts[i++].iov_len)
        memcpy((uint8_t *)table + from, parts[i].iov_base, parts[i].iov_len);
    return n ? (uint16_t)(bytes / sizeof *table) : 0;
}

/* Follow a chain from its head. Returns 1 or -1. */
static int follow(const struct virtqueue *queue, uint16_t head, struct chain *chain)
{
    struct vring_descriptor indirect[VIRTQUEUE_MAX];
    const struct vring_descriptor *table = queue->descriptors;
    uint16_t size = queue->size, at = head;
    int added = 1;
    for (unsigned steps = 0; steps < size; steps++) {
        struct vring_descriptor descriptor = copy(&table[at]);
        if (descriptor.flags & DESCRIPTOR_INDIRECT) {
            if (table == indirect || !(size = copy_table(queue, &descriptor, indirect)))
                return -1;
            table = indirect;
            at = 0;
            steps = UINT32_MAX; /* 0 in the next turn */
            continue;
        }
        added = add(queue, chain, &descriptor);
        if (added < 0)
            return -1;
        chain->is_bad |= !added;
        if (!(descriptor.flags & DESCRIPTOR_NEXT))
            return added ? 1 : -1; /* without the last there is no place for an answer */
        at = descriptor.next;
        if (at >= size)
            return -1;
    }
    return -1; /* a loop */
}

bool virtqueue_has_more(const struct virtqueue *queue)
{
    return queue->n_resubmit || load16(&queue->available->index) != queue->next;
}

/* Note that a request was begun, before anything of it is done. */
static void note(struct virtqueue *queue, uint16_t head)
{
    if (!queue->inflight)
        return;
    struct inflight_descriptor *descriptor = &queue->inflight->descriptors[head];
    __atomic_store_n(&descriptor->counter, queue->n_taken++, __ATOMIC_RELAXED);
    __atomic_store_n(&descriptor->inflight, 1, __ATOMIC_RELEASE);
}

int virtqueue_take(struct virtqueue *queue, struct chain *chain)
{
    if (!virtqueue_has_more(queue))
        return 0;
    if (queue->n_resubmit) {
        chain->head = queue->resubmit[--queue->n_resubmit];
    } else {
        if ((uint16_t)(load16(&queue->available->index) - queue->next) > queue->size)
            return -1;
        chain->head = load16(&queue->available->ring[queue->next % queue->size]);
        if (chain->head >= queue->size)
            return -1;
        note(queue, chain->head);
        queue->next++;
    }
    chain->n_out = chain->n_in = 0;
    chain->is_bad = false;
    return follow(queue, chain->head, chain);
}

bool virtqueue_enable_kicks(struct virtqueue *queue)
{
    if (queue->has_event_index)
        store16(available_event(queue), queue->next);
    else
        store16(&queue->used->flags, 0);
    atomic_thread_fence(memory_order_seq_cst); /* it is seen, or we see what has come */
    return virtqueue_has_more(queue);
}

void virtqueue_disable_kicks(struct virtqueue *queue)
{
    if (!queue->has_event_index) /* else the event stays behind, and is not reached again */
        store16(&queue->used->flags, NO_NOTIFY);
}

void virtqueue_answer(struct virtqueue *queue, uint16_t head, uint32_t written)
{
    struct inflight_queue *inflight = queue->inflight;
    if (inflight) {
        store16(&inflight->descriptors[head].next, inflight->last_batch_head);
        store16(&inflight->last_batch_head, head);
    }
    queue->used->ring[queue->used_index % queue->size] = (struct vring_used_element){head, written};
    store16(&queue->used->index, ++queue->used_index);
    if (inflight) {
        __atomic_store_n(&inflight->descriptors[head].inflight, 0, __ATOMIC_RELEASE);
        store16(&inflight->used_index, queue->used_index);
    }
}

bool virtqueue_wants_interrupt(struct virtqueue *queue)
{
    uint16_t before = queue->signalled, now = queue->used_index;
    bool is_first = !queue->has_signalled;
    if (!is_first && before == now)
        return false;
    atomic_thread_fence(memory_order_seq_cst); /* the answer is seen, or we see the wish */
    queue->signalled = now;
    queue->has_signalled = true;
    if (!queue->has_event_index)
        return !(load16(&queue->available->flags) & NO_INTERRUPT);
    return is_first || (uint16_t)(now - load16(used_event(queue)) - 1) < (uint16_t)(now - before);
}
