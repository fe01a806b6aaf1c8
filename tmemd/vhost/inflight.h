/* SPDX-License-Identifier: BSD-3-Clause */
/* The area in which what is in flight outlives this process (vhost-user, 'Inflight I/O tracking'):
 * the front end keeps its file, and hands it to whoever serves it next. What it holds of each queue
 * is in virtqueue.c. It changes only while no queue runs. */
#pragma once

#include "virtqueue.h"

struct inflight {
    struct region region;
    uint16_t n_queues, queue_size;
    _Atomic bool lost; /* its file was truncated: what is noted there is lost with us */
};

/* Make a new file of zeros that nobody can truncate, for as many queues as *area says, and fill in
 * the rest of it. Returns a descriptor, or -1: it is not possible. */
int inflight_make(struct vhost_inflight_area *area);
/* Use the area in this file from now on, the descriptor of which stays the caller's. Returns 0 or
 * an errno; then there is none. */
int inflight_set(struct inflight *inflight, const struct vhost_inflight_area *area, int fd);
void inflight_clear(struct inflight *inflight);
/* The part of a queue of so many descriptors, NULL without an area. False: it has no such part. */
bool inflight_find(const struct inflight *inflight, unsigned index, uint16_t size,
                   struct inflight_queue **found);
