/* SPDX-License-Identifier: BSD-3-Clause */
#include "staging.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "thread.h"

/* With nothing to do, look so often again, each 1 ms, before going to sleep. */
enum { LOOKS = 50, LOOK_EVERY = 1000000 };

void staging_init(struct staging *staging)
{
    long most = sysconf(_SC_NPROCESSORS_ONLN) / 2;
    most = most < 1 ? 1 : most < STAGING_WORKERS ? most : STAGING_WORKERS;
    *staging = (struct staging){.most_workers = (unsigned)most};
    pthread_mutex_init(&staging->lock, NULL);
    pthread_cond_init(&staging->changed, NULL);
}

void staging_destroy(struct staging *staging)
{
    pthread_mutex_lock(&staging->lock);
    staging->stopping = true;
    pthread_cond_broadcast(&staging->changed);
    pthread_mutex_unlock(&staging->lock);
    for (unsigned i = 0; i < staging->n_workers; i++)
        pthread_join(staging->workers[i], NULL);
    free(staging->pages);
    pthread_mutex_destroy(&staging->lock);
    pthread_cond_destroy(&staging->changed);
}

/* Whether there is somebody to take what comes in: threads of this process, not of one that has
 * forked since. */
static bool start(struct staging *staging, void *(*work)(void *), void *argument)
{
    bool is_behind = staging->in - staging->out > STAGING_PAGES / 2;
    if (!staging->pages)
        staging->pages = malloc(STAGING_PAGES * sizeof *staging->pages);
    if (staging->pages && staging->n_workers < (is_behind ? staging->most_workers : 1))
        staging->n_workers += thread_start(&staging->workers[staging->n_workers], work, argument);
    return staging->n_workers;
}

bool staging_add(struct staging *staging, uint64_t page, uint64_t word, const uint8_t *content,
                 void *(*work)(void *), void *argument)
{
    pthread_mutex_lock(&staging->lock);
    bool added = staging->in - staging->out < STAGING_PAGES && start(staging, work, argument);
    if (added) {
        struct staged *staged = &staging->pages[staging->in++ % STAGING_PAGES];
        staged->page = page;
        staged->word = word;
        memcpy(staged->content, content, TM_PAGE);
        if (staging->asleep)
            pthread_cond_broadcast(&staging->changed);
        staging->asleep = false;
    }
    pthread_mutex_unlock(&staging->lock);
    return added;
}

uint64_t staging_waiting(struct staging *staging)
{
    pthread_mutex_lock(&staging->lock);
    uint64_t waiting = staging->in - staging->done;
    pthread_mutex_unlock(&staging->lock);
    return waiting;
}

/* Whoever adds a page must not pay for waking us each time: that takes 25 to 30 us where CPUs are
 * virtual, and a read from a disk 70. Under its lock. */
static void wait_for_more(struct staging *staging, unsigned looks)
{
    if (looks < LOOKS) {
        pthread_mutex_unlock(&staging->lock);
        nanosleep(&(struct timespec){.tv_nsec = LOOK_EVERY}, NULL);
        pthread_mutex_lock(&staging->lock);
    } else {
        staging->asleep = true;
        pthread_cond_wait(&staging->changed, &staging->lock);
    }
}

bool staging_take(struct staging *staging, struct staged *oldest, unsigned done)
{
    pthread_mutex_lock(&staging->lock);
    staging->done += done;
    for (unsigned looks = 0; staging->in == staging->out && !staging->stopping; looks++)
        wait_for_more(staging, looks);
    bool taken = !staging->stopping;
    if (taken)
        *oldest = staging->pages[staging->out++ % STAGING_PAGES];
    pthread_mutex_unlock(&staging->lock);
    return taken;
}
