/* SPDX-License-Identifier: BSD-3-Clause */
/* Sums over the index words by generation, kept up with every word that changes: to scan the index
 * took 60 ms for a device of 64 GiB with every page in tmem. No lock; they may be wrong by the
 * pages that change. */
#pragma once

#include <stdatomic.h>

#include "word.h"

struct ages {
    _Atomic uint64_t stored[TM_GENERATIONS];  /* bytes of slots */
    _Atomic uint64_t raw[TM_GENERATIONS];     /* of these, of incompressible pages */
    _Atomic uint64_t clean[TM_GENERATIONS];   /* of these, of pages that the file holds as well */
    _Atomic uint64_t again[TM_GENERATIONS];   /* of these, of pages that were used more than once */
    _Atomic uint64_t in_file[TM_GENERATIONS]; /* pages */
    _Atomic uint64_t n_again;                 /* pages in tmem that were used more than once */
};

/* The word of a page changes, or enters the index (old: TM_NOWHERE). */
void ages_change(struct ages *ages, uint64_t old, uint64_t new);

/* A generation's sum; while it is being changed it may be below 0 for a moment, which is 0. */
static inline uint64_t ages_known(const _Atomic uint64_t *sum)
{
    uint64_t now = atomic_load_explicit(sum, memory_order_relaxed);
    return (int64_t)now < 0 ? 0 : now;
}

/* The generation of pages that are this old in generation `now`; ancient ones have 0. */
static inline unsigned ages_generation(unsigned now, unsigned age)
{
    return age == TM_ANCIENT ? 0 : now > age ? now - age : now + TM_ANCIENT - age;
}

/* How many generations ago, in generation `now`, the page was last used: 0 to TM_ANCIENT. */
static inline unsigned ages_of(unsigned now, uint64_t word)
{
    unsigned then = word_generation(word);
    return then ? (now + TM_ANCIENT - then) % TM_ANCIENT : TM_ANCIENT;
}
