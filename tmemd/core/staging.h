/* SPDX-License-Identifier: BSD-3-Clause */
/* Copies of pages that were read from the source and wait to be put: a miss does not pay for
 * compression. A bounded queue; its mutex is a leaf, held for a copy of a page. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* 4 MiB. A thread puts 150,000 pages a second. As long as the queue is more than half full there is
 * one more, up to one for each two CPUs. */
enum { STAGING_PAGES = 1024, STAGING_WORKERS = 4 };

struct staged {
    uint64_t page, word; /* what its word was when it was read */
    uint8_t content[TM_PAGE];
};

struct staging {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct staged *pages;   /* NULL until the first comes */
    uint64_t in, out, done; /* how many ever came, were taken, and were dealt with */
    bool stopping, asleep;  /* asleep: a worker must be woken */
    unsigned n_workers, most_workers;
    pthread_t workers[STAGING_WORKERS];
};

void staging_init(struct staging *staging);
/* End the workers, and forget what waits. */
void staging_destroy(struct staging *staging);
/* Take in a copy; false: there is no room. `work` is started in threads of its own. */
bool staging_add(struct staging *staging, uint64_t page, uint64_t word, const uint8_t *content,
                 void *(*work)(void *), void *argument);
/* Copies that nobody has dealt with yet. */
uint64_t staging_waiting(struct staging *staging);
/* For a worker that is done with so many that it took before: wait for the oldest, and take it.
 * False: end. */
bool staging_take(struct staging *staging, struct staged *oldest, unsigned done);
