/* SPDX-License-Identifier: BSD-3-Clause */
/* A virtqueue that is served. Its threads share one role: who leads takes requests out of the ring
 * and carries out what needs no disk. For one that may wait for the file he hands the lead to
 * another thread first, so that nobody's page in RAM waits for a disk.
 *
 * Locks: `lead` guards who leads and how many threads there are; `answers` the used ring and
 * the inflight area. Leaves,
 * never held together, nor over a request. */
#pragma once

#include <pthread.h>

#include "vhost.h"
#include "virtqueue.h"

enum { QUEUE_THREADS = 32 };

struct queue {
    struct virtqueue ring;
    struct vhost_vring_address address; /* as the front end gave it */
    bool has_address, is_enabled;
    int kick, call, failure; /* eventfds of the front end; -1: none */

    /* While it runs. */
    const struct vhost_config *config;
    const _Atomic bool *write_back;
    int socket;      /* shut down when the guest breaks the rules */
    int epoll, stop; /* what the leader sleeps on, and what wakes him to end */
    _Atomic bool stopping;
    _Atomic bool broken;
    unsigned points, chance, short_sleeps; /* the leader's, of watching the ring */
    pthread_mutex_t lead, answers;
    pthread_cond_t changed;
    bool has_leader;
    unsigned n_threads, n_idle;
    pthread_t threads[QUEUE_THREADS];
};

void queue_init(struct queue *queue);
/* It stands still, and its descriptors are closed. */
void queue_destroy(struct queue *queue);
/* Serve it: the ring is set, nobody changes its settings until it is stopped. Returns 0 or an
 * errno. */
int queue_start(struct queue *queue, const struct vhost_config *config,
                const _Atomic bool *write_back, int socket);
/* Every request that was taken is answered when this returns. */
void queue_stop(struct queue *queue);
/* The same, and what the last process left unanswered is, too: nobody finds that in the ring. */
void queue_finish(struct queue *queue);
bool queue_is_running(const struct queue *queue);
/* Replace one of its descriptors, closing the old one; but for `kick` also while it runs. */
void queue_set_fd(struct queue *queue, int *place, int fd);
/* Tell the guest to look, whatever it wants to know. */
void queue_interrupt(struct queue *queue);
