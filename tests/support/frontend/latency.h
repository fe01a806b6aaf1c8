/* SPDX-License-Identifier: BSD-3-Clause */
/* A histogram of latencies with 64 steps to each power of two: off by less than 1 %. */
#pragma once

#include <stdint.h>

enum { STEP_BITS = 6, STEPS = 1 << STEP_BITS, BUCKETS = STEPS * (64 - STEP_BITS) };

struct latency {
    uint64_t total, counts[BUCKETS];
};

static inline unsigned bucket_of(uint64_t ns)
{
    if (ns < STEPS)
        return ns;
    unsigned shift = 63 - __builtin_clzll(ns) - STEP_BITS;
    return (shift << STEP_BITS) + (ns >> shift);
}

static inline void latency_note(struct latency *latency, uint64_t ns)
{
    latency->counts[bucket_of(ns)]++;
    latency->total++;
}

/* The middle of the bucket that holds the given share (0 to 1) of all; 0 where there is none. */
static inline uint64_t latency_at(const struct latency *latency, double share)
{
    uint64_t wanted = latency->total * share, seen = 0;
    for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
        seen += latency->counts[bucket];
        if (seen > wanted) {
            unsigned shift = bucket < STEPS ? 0 : (bucket >> STEP_BITS) - 1;
            uint64_t low = (uint64_t)(bucket - (shift << STEP_BITS)) << shift;
            return low + (UINT64_C(1) << shift) / 2;
        }
    }
    return 0;
}
