/* SPDX-License-Identifier: BSD-3-Clause */
/* Syncs of one file, one at a time: each is for all who ask before it begins. So whoever is told
 * that one has failed can say so before another begins; the kernel tells it once. */
#pragma once

#include <pthread.h>
#include <stdint.h>

struct syncs {
    pthread_mutex_t lock; /* guards what follows; not held over a sync */
    pthread_cond_t ended;
    uint64_t begun, done; /* numbers of syncs; where they differ one is under way */
    uint64_t failed;      /* the last one that failed, */
    int error;            /* with this errno */
};

void syncs_init(struct syncs *syncs);
void syncs_destroy(struct syncs *syncs);
/* Have one that begins from now on: 0, or its errno. `owner` is for `sync`. */
int syncs_join(struct syncs *syncs, int (*sync)(void *owner), void *owner);
