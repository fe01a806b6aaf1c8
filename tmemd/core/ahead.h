/* SPDX-License-Identifier: BSD-3-Clause */
/* Runs of pages that are to be fetched ahead, or are being fetched, by threads of the device's own.
 * A bounded queue; its mutex is a leaf, held for a look at all that is in it. */
#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* A thread waits for one read at a time: so many go on at once. Each begins when there is something
 * to fetch and none is free. */
enum { AHEAD_RUNS = 32, AHEAD_WORKERS = 8 };

/* Seconds. A read that takes longer hangs: whoever waits for it had better ask the file itself,
 * which may be the sooner, and says when to give up. */
enum { AHEAD_PATIENCE = 1 };

struct ahead_run {
    uint64_t first;
    uint32_t n;      /* 0: nothing */
    uint64_t number; /* of all that ever came */
    bool taken;
};

struct ahead {
    pthread_mutex_t lock;
    pthread_cond_t came, done;
    struct ahead_run runs[AHEAD_RUNS];
    _Atomic unsigned n_runs;
    uint64_t n_came;
    bool stopping;
    unsigned n_waiting; /* runs that nobody has taken */
    unsigned n_workers, n_free;
    pthread_t workers[AHEAD_WORKERS];
};

void ahead_init(struct ahead *ahead);
/* End the workers, once what they fetch has come, and forget what waits. */
void ahead_destroy(struct ahead *ahead);
/* Take in a run, unless there is no room, or some of it is there already. `work` is started in
 * threads of its own. */
void ahead_add(struct ahead *ahead, uint64_t first, uint32_t n, void *(*work)(void *),
               void *argument);
/* For a worker, which is done with the run that it took before (NULL: none): wait for the oldest,
 * and take it. NULL: end. */
const struct ahead_run *ahead_take(struct ahead *ahead, const struct ahead_run *before);
/* Wait until a page that is to be fetched, or is being fetched, has been, but no longer than
 * AHEAD_PATIENCE; false: it is not. */
bool ahead_wait(struct ahead *ahead, uint64_t page);
