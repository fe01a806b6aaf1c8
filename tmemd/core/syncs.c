/* SPDX-License-Identifier: BSD-3-Clause */
#include "syncs.h"

void syncs_init(struct syncs *syncs)
{
    *syncs = (struct syncs){0};
    pthread_mutex_init(&syncs->lock, NULL);
    pthread_cond_init(&syncs->ended, NULL);
}

void syncs_destroy(struct syncs *syncs)
{
    pthread_mutex_destroy(&syncs->lock);
    pthread_cond_destroy(&syncs->ended);
}

/* Under the lock but for the call itself. */
static void sync_now(struct syncs *syncs, int (*sync)(void *owner), void *owner)
{
    uint64_t number = ++syncs->begun;
    pthread_mutex_unlock(&syncs->lock);
    int error = sync(owner);
    pthread_mutex_lock(&syncs->lock);
    syncs->done = number;
    if (error) {
        syncs->failed = number;
        syncs->error = error;
    }
    pthread_cond_broadcast(&syncs->ended);
}

int syncs_join(struct syncs *syncs, int (*sync)(void *owner), void *owner)
{
    pthread_mutex_lock(&syncs->lock);
    uint64_t needed = syncs->begun + 1; /* one that is under way may have missed what we wrote */
    while (syncs->done < needed) {
        if (syncs->begun == syncs->done)
            sync_now(syncs, sync, owner);
        else
            pthread_cond_wait(&syncs->ended, &syncs->lock);
    }
    int error = syncs->failed >= needed ? syncs->error : 0;
    pthread_mutex_unlock(&syncs->lock);
    return error;
}
