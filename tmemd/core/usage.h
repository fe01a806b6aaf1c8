/* SPDX-License-Identifier: BSD-3-Clause */
/* What an ephemeral pool has learnt of how its pages are used (docs/decisions/0011). Any thread of
 * the serving process learns; no lock. */
#pragma once

#include <stdbool.h>

#include "statistics.h"

/* A generation lasts until this part of the pages in tmem has missed: LRU would still have a page
 * that was used less than as many generations ago. */
enum { USAGE_TURNS = 4 };

struct usage {
    _Atomic uint64_t missed; /* pages, ever */
    _Atomic uint64_t begun;  /* what that was when the generation began */
    _Atomic uint64_t share;  /* of the pages in tmem, how many may be such as were used once */
};

/* Let the share grow, or shrink, by a page; it is at most all of those in tmem. */
static inline void usage_learn(struct usage *usage, bool grow, uint64_t pages)
{
    uint64_t share = atomic_load_explicit(&usage->share, memory_order_relaxed), wanted;
    do {
        wanted = grow ? share + 1 : share - (share > 0);
        wanted = wanted < pages ? wanted : pages;
    } while (wanted != share && !atomic_compare_exchange_weak(&usage->share, &share, wanted));
}
