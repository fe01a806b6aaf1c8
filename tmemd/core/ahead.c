/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "ahead.h"

#include <time.h>

#include "thread.h"

void ahead_init(struct ahead *ahead)
{
    *ahead = (struct ahead){0};
    pthread_mutex_init(&ahead->lock, NULL);
    pthread_cond_init(&ahead->came, NULL);
    pthread_cond_init(&ahead->done, NULL);
}

void ahead_destroy(struct ahead *ahead)
{
    pthread_mutex_lock(&ahead->lock);
    ahead->stopping = true;
    pthread_cond_broadcast(&ahead->came);
    pthread_mutex_unlock(&ahead->lock);
    for (unsigned i = 0; i < ahead->n_workers; i++)
        pthread_join(ahead->workers[i], NULL);
    pthread_mutex_destroy(&ahead->lock);
    pthread_cond_destroy(&ahead->came);
    pthread_cond_destroy(&ahead->done);
}

/* The run that has one of these pages. Under the lock, as all that follow. */
static struct ahead_run *run_of(struct ahead *ahead, uint64_t first, uint32_t n)
{
    for (struct ahead_run *run = ahead->runs; run < ahead->runs + AHEAD_RUNS; run++)
        if (run->n && run->first < first + n && first < run->first + run->n)
            return run;
    return NULL;
}

static struct ahead_run *free_run(struct ahead *ahead)
{
    for (struct ahead_run *run = ahead->runs; run < ahead->runs + AHEAD_RUNS; run++)
        if (!run->n)
            return run;
    return NULL;
}

static struct ahead_run *oldest(struct ahead *ahead)
{
    struct ahead_run *found = NULL;
    for (struct ahead_run *run = ahead->runs; run < ahead->runs + AHEAD_RUNS; run++)
        if (run->n && !run->taken && (!found || run->number < found->number))
            found = run;
    return found;
}

/* Whether there is somebody to fetch it: threads of this process, not of one that has forked since.
 */
static bool start(struct ahead *ahead, void *(*work)(void *), void *argument)
{
    if (ahead->n_free <= ahead->n_waiting && ahead->n_workers < AHEAD_WORKERS)
        ahead->n_workers += thread_start(&ahead->workers[ahead->n_workers], work, argument);
    return ahead->n_workers;
}

void ahead_add(struct ahead *ahead, uint64_t first, uint32_t n, void *(*work)(void *),
               void *argument)
{
    pthread_mutex_lock(&ahead->lock);
    struct ahead_run *run = run_of(ahead, first, n) ? NULL : free_run(ahead);
    if (run && start(ahead, work, argument)) {
        *run = (struct ahead_run){.first = first, .n = n, .number = ahead->n_came++};
        ahead->n_waiting++;
        atomic_fetch_add(&ahead->n_runs, 1);
        pthread_cond_signal(&ahead->came);
    }
    pthread_mutex_unlock(&ahead->lock);
}

static void finish(struct ahead *ahead, const struct ahead_run *taken)
{
    ahead->runs[taken - ahead->runs].n = 0;
    atomic_fetch_sub(&ahead->n_runs, 1);
    pthread_cond_broadcast(&ahead->done);
}

const struct ahead_run *ahead_take(struct ahead *ahead, const struct ahead_run *before)
{
    struct ahead_run *run = NULL;
    pthread_mutex_lock(&ahead->lock);
    if (before)
        finish(ahead, before);
    ahead->n_free++;
    while (!ahead->stopping && !(run = oldest(ahead)))
        pthread_cond_wait(&ahead->came, &ahead->lock);
    ahead->n_free--;
    if (run) {
        run->taken = true;
        ahead->n_waiting--;
    }
    pthread_mutex_unlock(&ahead->lock);
    return run;
}

bool ahead_wait(struct ahead *ahead, uint64_t page)
{
    if (!atomic_load(&ahead->n_runs))
        return false;
    pthread_mutex_lock(&ahead->lock);
    struct ahead_run *run = run_of(ahead, page, 1);
    uint64_t number = run ? run->number : 0;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += AHEAD_PATIENCE;
    while (run && run->n && run->number == number &&
           pthread_cond_clockwait(&ahead->done, &ahead->lock, CLOCK_MONOTONIC, &until) == 0)
        ;
    pthread_mutex_unlock(&ahead->lock);
    return run;
}
