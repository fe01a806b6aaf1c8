/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "load.h"

#include <sched.h>
#include <string.h>
#include <time.h>

#include "../content.h"
#include "common.h"

#define SECOND UINT64_C(1000000000)

/* Where a run is. */
struct progress {
    uint64_t start, time, sent; /* time: the clock is read once for all that happens together */
    unsigned in_flight, n_free;
    unsigned free[MAX_DEPTH];
};

static uint64_t random_below(struct load *load, uint64_t below)
{
    return (unsigned __int128)next_random(&load->random) * below >> 64;
}

static enum operation any_operation(struct load *load)
{
    uint64_t all = load->shares[OP_READ] + load->shares[OP_WRITE] + load->shares[OP_ZERO];
    uint64_t number = random_below(load, all);

    if (number < load->shares[OP_READ])
        return OP_READ;
    return number < all - load->shares[OP_ZERO] ? OP_WRITE : OP_ZERO;
}

static uint8_t *any_content(struct load *load)
{
    return load->corpus + PAGE * random_below(load, load->corpus_pages - load->block / PAGE);
}

/* False: whoever shares the ledger has all the pages that were tried. */
static bool choose(struct load *load, const struct progress *progress, struct request *request)
{
    unsigned tries = load->sequential ? 1 : 64;

    request->operation = any_operation(load);
    request->length = load->block;
    request->data = request->buffer;
    if (request->operation == OP_WRITE && !load->ledger)
        request->data = any_content(load);
    for (unsigned i = 0; i < tries; i++) {
        uint64_t block =
            load->sequential ? progress->sent % load->blocks : random_below(load, load->blocks);
        request->offset = (load->first + block) * load->block;
        if (!load->ledger || ledger_begin(load->ledger, request))
            return true;
    }
    return false;
}

static uint64_t due(const struct load *load, const struct progress *progress)
{
    if (load->rate < 0)
        return 0;
    return load->rate ? progress->start + (progress->sent + 1) * (SECOND / load->rate) : UINT64_MAX;
}

static bool is_over(const struct load *load, const struct progress *progress)
{
    return load->count ? progress->sent == load->count
                       : progress->time >= progress->start + load->duration;
}

static void submit_all(struct load *load, struct progress *progress)
{
    while (progress->n_free && !is_over(load, progress) && progress->time >= due(load, progress)) {
        struct request *request = &load->requests[progress->free[progress->n_free - 1]];
        if (!choose(load, progress, request))
            break;
        request->started = progress->time;
        request->in_flight = true;
        load->door->submit(load->door, request);
        progress->n_free--;
        progress->in_flight++;
        progress->sent++;
    }
    load->door->push(load->door);
}

static void finish(struct load *load, struct progress *progress, struct result *result,
                   struct request *request)
{
    latency_note(&result->latency, progress->time - request->started);
    result->requests++;
    result->failed += request->failed;
    if (load->ledger)
        result->wrong += ledger_end(load->ledger, request);
    request->in_flight = false;
    progress->free[progress->n_free++] = request->number;
    progress->in_flight--;
}

static void come_back(struct load *load, struct result *result)
{
    uint64_t end = now() + load->patience * SECOND;

    if (load->patience == 0)
        die("the server", "has gone");
    while (!load->door->resume(load->door)) {
        if (now() > end)
            die("the server", "does not come back");
        nanosleep(&(struct timespec){.tv_nsec = SECOND / 1000}, NULL);
    }
    result->returns++;
}

/* With nothing in flight: until the next request is due, or somebody lets go of a page. */
static void wait_for_turn(const struct load *load, const struct progress *progress)
{
    uint64_t until = due(load, progress), end = progress->start + load->duration;

    if (until > end && !load->count)
        until = end;
    struct timespec time = {.tv_sec = until / SECOND, .tv_nsec = until % SECOND};
    if (load->rate < 0)
        sched_yield();
    else
        clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL);
}

static void collect(struct load *load, struct progress *progress, struct result *result)
{
    struct request *finished[MAX_DEPTH];
    unsigned n = load->door->reap(load->door, finished);

    if (n == 0)
        come_back(load, result);
    progress->time = now();
    for (unsigned i = 0; i < n; i++)
        finish(load, progress, result, finished[i]);
}

void load_run(struct load *load, struct result *result)
{
    struct progress progress = {.start = now()};

    progress.time = progress.start;
    while (progress.n_free < load->depth) {
        progress.free[progress.n_free] = load->depth - 1 - progress.n_free;
        progress.n_free++;
    }
    for (;;) {
        submit_all(load, &progress);
        if (progress.in_flight) {
            collect(load, &progress, result);
        } else if (is_over(load, &progress)) {
            break;
        } else {
            wait_for_turn(load, &progress);
            progress.time = now();
        }
    }
    result->elapsed = progress.time - progress.start;
}
