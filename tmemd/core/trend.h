/* SPDX-License-Identifier: BSD-3-Clause */
/* Where a device will be read next. Accesses fall into streams, and of each the last distances are
 * kept: what more than half of them agree on is its trend (Leap, USENIX ATC 2020: Boyer and Moore's
 * majority vote over windows that double until one has a majority). Pure; no lock. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "bounce.h"

/* Leap's history. Its shortest window is half of that; with 4 a stream is known by its fifth access
 * instead of its ninth, and random accesses still show no trend: three of four must agree. */
enum { TREND_HISTORY = 32, TREND_SHORTEST = 4 };

/* Streams at a time; an access within NEAR pages of one belongs to it. Linux gives each CPU 256
 * slots of swap at a time (SWAPFILE_CLUSTER). The first takes all accesses: it sees long strides.
 */
enum { TREND_STREAMS = 9, TREND_NEAR = 256 };

/* Ahead of a stream there are at most so many pages, and runs. */
enum { TREND_PAGES = TM_RUN_MAX, TREND_RUNS = 16 };

struct stream {
    int64_t deltas[TREND_HISTORY]; /* from the last page of an access to the first of the next */
    uint64_t n_deltas;             /* ever */
    uint64_t last;                 /* page that was accessed */
    uint64_t edge;                 /* the last page that was fetched ahead, or `last` */
    uint32_t window;               /* steps that may be ahead */
    uint32_t hits;                 /* since the window changed */
    uint64_t used;                 /* number of its last access */
    int64_t stride;                /* along which pages were fetched; 0: along none yet */
};

struct trend {
    struct stream streams[TREND_STREAMS];
    uint64_t accesses;
};

struct trend_run {
    uint64_t first;
    uint32_t n;
};

/* What more than half of the newest of n distances agree on; deltas[i % TREND_HISTORY] is the ith
 * that ever came. False: there is none. */
bool trend_majority(const int64_t *deltas, uint64_t n, int64_t *delta);

/* Learn that n <= TM_RUN_MAX pages of a device of `pages` were read; `hit`: they had been fetched
 * ahead, or are being fetched. Returns how many runs are to be fetched now, the nearest first. */
unsigned trend_access(struct trend *trend, uint64_t pages, uint64_t first, uint32_t n, bool hit,
                      struct trend_run runs[TREND_RUNS]);
