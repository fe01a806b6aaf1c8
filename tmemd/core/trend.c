/* SPDX-License-Identifier: BSD-3-Clause */
#include "trend.h"

#include <stddef.h>

/* Boyer and Moore's vote among the newest `window`; its winner has to be counted. */
static bool vote(const int64_t *deltas, uint64_t n, unsigned window, int64_t *winner)
{
    unsigned lead = 0, count = 0;
    for (uint64_t i = n - window; i < n; i++) {
        int64_t delta = deltas[i % TREND_HISTORY];
        if (!lead)
            *winner = delta;
        lead = delta == *winner ? lead + 1 : lead - 1;
    }
    for (uint64_t i = n - window; i < n; i++)
        count += deltas[i % TREND_HISTORY] == *winner;
    return count > window / 2;
}

bool trend_majority(const int64_t *deltas, uint64_t n, int64_t *delta)
{
    for (unsigned window = TREND_SHORTEST; window <= TREND_HISTORY && window <= n; window *= 2)
        if (vote(deltas, n, window, delta))
            return true;
    return false;
}

static uint64_t distance(uint64_t one, uint64_t other)
{
    return one > other ? one - other : other - one;
}

/* The nearest stream that has the page, or the one that was longest without an access, anew. */
static struct stream *stream_of(struct trend *trend, uint64_t page)
{
    struct stream *oldest = &trend->streams[1], *nearest = NULL;
    for (struct stream *stream = oldest; stream < trend->streams + TREND_STREAMS; stream++) {
        if (stream->used < oldest->used)
            oldest = stream;
        if (stream->used && distance(stream->last, page) <= TREND_NEAR &&
            (!nearest || distance(stream->last, page) < distance(nearest->last, page)))
            nearest = stream;
    }
    if (!nearest)
        *oldest = (struct stream){0};
    return nearest ? nearest : oldest;
}

static void note(struct trend *trend, struct stream *stream, uint64_t first, uint32_t n)
{
    if (stream->used)
        stream->deltas[stream->n_deltas++ % TREND_HISTORY] = (int64_t)(first - stream->last);
    stream->last = first + n - 1;
    stream->used = trend->accesses;
}

/* How many strides the edge is ahead of what was last accessed; -1: it is nowhere ahead. */
static int64_t steps_ahead(const struct stream *stream)
{
    int64_t gap = (int64_t)(stream->edge - stream->last);
    bool is_ahead = gap % stream->stride == 0 && gap / stream->stride >= 0 &&
                    gap / stream->stride <= TREND_PAGES;
    return is_ahead ? gap / stream->stride : -1;
}

/* Strides along which TREND_PAGES or TREND_RUNS are reached. */
static uint32_t most_steps(const struct stream *stream, uint32_t n)
{
    uint32_t steps = TREND_PAGES / n;
    bool is_dense = stream->stride == n || stream->stride == -(int64_t)n;
    return steps < TREND_RUNS || is_dense ? steps : TREND_RUNS;
}

static void resize(struct stream *stream, uint32_t window)
{
    stream->window = window ? window : 1;
    stream->hits = 0;
}

/* Whole windows of hits let it grow; what was fetched in vain lets it shrink. */
static void learn(struct stream *stream, int64_t stride, uint32_t n, bool hit)
{
    if (stride != stream->stride) {
        stream->stride = stride;
        stream->edge = stream->last;
        resize(stream, 1);
    } else if (!hit || steps_ahead(stream) < 0) {
        if (stream->edge != stream->last)
            resize(stream, stream->window / 2);
        stream->edge = stream->last;
    } else if (++stream->hits >= stream->window) {
        resize(stream, 2 * stream->window);
    }
    uint32_t most = most_steps(stream, n);
    stream->window = stream->window < most ? stream->window : most;
}

/* Add a step to the runs, to the last of them if it is its neighbour; false: it does not fit. */
static bool add_step(struct trend_run *runs, unsigned *n_runs, uint64_t first, uint32_t n)
{
    struct trend_run *last = *n_runs ? &runs[*n_runs - 1] : NULL;
    bool joins = last && last->n + n <= TM_RUN_MAX &&
                 (first == last->first + last->n || first + n == last->first);
    if (joins) {
        last->first = first < last->first ? first : last->first;
        last->n += n;
        return true;
    }
    if (*n_runs == TREND_RUNS)
        return false;
    runs[(*n_runs)++] = (struct trend_run){first, n};
    return true;
}

/* Fill the window once half of it has been used up. */
static unsigned go_ahead(struct stream *stream, uint64_t pages, uint32_t n, struct trend_run *runs)
{
    unsigned n_runs = 0;
    int64_t steps = steps_ahead(stream);
    if (steps > stream->window / 2)
        return 0;
    for (; steps < stream->window; steps++) {
        uint64_t end = stream->edge + (uint64_t)stream->stride, first = end - (n - 1);
        if (end >= pages || first >= pages || !add_step(runs, &n_runs, first, n))
            break;
        stream->edge = end;
    }
    return n_runs;
}

unsigned trend_access(struct trend *trend, uint64_t pages, uint64_t first, uint32_t n, bool hit,
                      struct trend_run runs[TREND_RUNS])
{
    struct stream *one = stream_of(trend, first), *all = trend->streams;
    int64_t delta;
    trend->accesses++;
    note(trend, one, first, n);
    note(trend, all, first, n);
    struct stream *stream = trend_majority(one->deltas, one->n_deltas, &delta)   ? one
                            : trend_majority(all->deltas, all->n_deltas, &delta) ? all
                                                                                 : NULL;
    if (!stream || stream->deltas[(stream->n_deltas - 1) % TREND_HISTORY] != delta ||
        delta + n == 1)
        return 0;
    learn(stream, delta + n - 1, n, hit);
    return go_ahead(stream, pages, n, runs);
}
