/* SPDX-License-Identifier: BSD-3-Clause */
/* The write-intent bitmap: one durable bit for each region of the device (as of md arrays). A set
 * bit says that after the host died the file is not to be trusted there; it is set before a change
 * is acknowledged and cleared only after the file is durable. No page lock is held over its I/O. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "fence.h"
#include "local.h"
#include "tmem.h"

enum { BITMAP_BITS_OFFSET = TM_PAGE };

/* BITMAP_SETTING: its bit is on the way to the disk. BITMAP_CLEANING: its bit is set, and will be
 * cleared unless somebody changes something there that the file does not hold. */
enum region_state { BITMAP_CLEAN = 0, BITMAP_SET = 1, BITMAP_CLEANING = 2, BITMAP_SETTING = 3 };

struct bitmap {
    struct store *store;       /* NULL: none */
    struct local local;        /* the store, if it is not another's */
    const struct fence *fence; /* where that is reached no bit is written */
    uint64_t offset;           /* where it begins in the store */
    bool whole_blocks;         /* the store takes no less */
    uint64_t region_pages, n;
    _Atomic uint8_t *regions; /* enum region_state */
    struct tm_counters *counters;
    pthread_mutex_t lock; /* held over each write of bits, its sync included */
    uint8_t *block;       /* what is written, aligned; under lock */
    bool rests;           /* no bit is set, whoever wants to; under lock */
};

/* Read the bits, and make them durable: the last process may have been killed before its sync. */
int bitmap_init(struct bitmap *bitmap, const struct tm_config *config, const struct fence *fence,
                const struct tm_layout *layout, struct tm_counters *counters);
void bitmap_destroy(struct bitmap *bitmap);

/* Set the bits of n pages, durably, where they are not. The caller holds no page lock. */
int bitmap_set(struct bitmap *bitmap, uint64_t first, uint32_t n);
/* Call with the page locks held: cancels a cleaning of these regions. Whether their bits are set,
 * and stay so while the locks are held. */
bool bitmap_is_set(struct bitmap *bitmap, uint64_t first, uint32_t n);

/* Cleaning, for one caller at a time: begin turns every set region into cleaning, keep takes one
 * back, finish clears the bits of those that nobody has marked since. Between begin and the first
 * look at a page, whoever held a page lock must have let go of it. */
void bitmap_begin_cleaning(struct bitmap *bitmap);
void bitmap_keep(struct bitmap *bitmap, uint64_t region);
int bitmap_finish_cleaning(struct bitmap *bitmap);
/* The file has everything, durably, and will: clear all bits, and set none until it wakes. */
int bitmap_rest(struct bitmap *bitmap);
void bitmap_wake(struct bitmap *bitmap);
static inline bool bitmap_region_is_set(struct bitmap *bitmap, uint64_t region)
{
    return atomic_load(&bitmap->regions[region]) != BITMAP_CLEAN;
}
