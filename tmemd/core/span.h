/* SPDX-License-Identifier: BSD-3-Clause */
/* One span of memory for records: which of its slots are live, and which of its pages allocated.
 *
 * Its slots are all of one size, and lie one behind the other without regard to page boundaries.
 * Sets of its pages are masks, with a bit for each. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

struct span {
    uint64_t allocated;  /* pages */
    uint64_t *live;      /* one bit for each slot in use; NULL: the span has no class */
    uint32_t prev, next; /* in its list, or in that of spans without a class */
    uint32_t size;       /* of its slots, in bytes */
    uint16_t n_live,
        n_free; /* a slot is free when it is not live and all its pages are allocated */
    uint8_t list;
};

/* How many slots of `size` bytes there are in a span. */
static inline uint32_t span_slots(uint32_t size) { return TM_SPAN_BYTES / size; }

/* How many pages n slots of `size` bytes reach into, from the first on. */
static inline uint32_t span_pages_for(uint32_t n, uint32_t size)
{
    return (n * size + TM_PAGE - 1) / TM_PAGE;
}

/* The lowest n of up to 64. */
static inline uint64_t span_lowest(uint32_t n)
{
    return n >= 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1;
}

/* The pages that a slot lies in. */
static inline uint64_t span_pages_of(uint32_t size, uint32_t slot)
{
    uint32_t first = slot * size / TM_PAGE, last = (slot * size + size - 1) / TM_PAGE;
    return (UINT64_C(2) << last) - (UINT64_C(1) << first);
}

/* The first run of neighbours in a set of pages that is not empty, of at most `most`. */
static inline uint64_t span_first_run(uint64_t pages, uint32_t most)
{
    uint32_t first = (uint32_t)__builtin_ctzll(pages);
    uint64_t rest = ~(pages >> first);
    uint32_t n = rest ? (uint32_t)__builtin_ctzll(rest) : TM_SPAN_PAGES;
    return span_lowest(n < most ? n : most) << first;
}

/* The pages that its slots reach into and that are not allocated. */
static inline uint64_t span_growth(const struct span *span)
{
    return span_lowest(span_pages_for(span_slots(span->size), span->size)) & ~span->allocated;
}

static inline bool span_is_live(const struct span *span, uint32_t slot)
{
    return span->live[slot / 64] >> slot % 64 & 1;
}

static inline void span_flip(struct span *span, uint32_t slot)
{
    span->live[slot / 64] ^= UINT64_C(1) << slot % 64;
}

/* Whether all pages of a slot are allocated. */
static inline bool span_is_backed(const struct span *span, uint32_t slot)
{
    return !(span_pages_of(span->size, slot) & ~span->allocated);
}

static inline uint16_t span_count_free(const struct span *span)
{
    uint16_t n = 0;
    for (uint32_t slot = 0; slot < span_slots(span->size); slot++)
        n += !span_is_live(span, slot) && span_is_backed(span, slot);
    return n;
}

/* The lowest free slot; there is one. */
static inline uint32_t span_lowest_free(const struct span *span)
{
    for (uint32_t word = 0;; word++)
        for (uint64_t gaps = ~span->live[word]; gaps; gaps &= gaps - 1) {
            uint32_t slot = word * 64 + (uint32_t)__builtin_ctzll(gaps);
            if (span_is_backed(span, slot))
                return slot;
        }
}

/* Lower *slot to the highest live slot below it; false: there is none. */
static inline bool span_next_live_below(const struct span *span, uint32_t *slot)
{
    for (uint32_t word = (*slot + 63) / 64; word-- > 0;) {
        uint64_t live = span->live[word] & span_lowest(*slot - word * 64);
        if (live) {
            *slot = word * 64 + 63 - (uint32_t)__builtin_clzll(live);
            return true;
        }
    }
    return false;
}

/* The allocated pages that no live slot reaches into. */
static inline uint64_t span_unused_pages(const struct span *span)
{
    uint64_t touched = 0;
    for (uint32_t slot = span_slots(span->size); span_next_live_below(span, &slot);)
        touched |= span_pages_of(span->size, slot);
    return span->allocated & ~touched;
}
