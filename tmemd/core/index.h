/* SPDX-License-Identifier: BSD-3-Clause */
/* The index: one word for each page of the device, in the pool file. Words are read without a lock;
 * who changes a page holds its page lock, and each store of a word happens under its entry lock. */
#pragma once

#include "state.h"

/* The page's word. What it points at stays there only under the page's entry lock. */
static inline uint64_t index_word(const struct tm_device *device, uint64_t page)
{
    return atomic_load_explicit(&device->index[page], memory_order_acquire);
}

/* The pages of a whole block, which may be the last. */
uint32_t index_block_pages(const struct tm_device *device, uint64_t block);

/* Account for a page whose word changes, or which enters the index (old: TM_NOWHERE). */
void index_account(struct tm_device *device, uint64_t old, uint64_t new);

/* Change bits of the page's word that do not move it; index_update_locked: under its entry lock
 * already. */
void index_update_locked(struct tm_device *device, uint64_t page, uint64_t word);
void index_update(struct tm_device *device, uint64_t page, uint64_t word);

/* Store a new word under the page lock, then free the slot of the old one, which is returned. */
uint64_t index_set(struct tm_device *device, uint64_t page, uint64_t word);
/* The same where the page's content changes: a stored page counts as invalidated. */
void index_replace(struct tm_device *device, uint64_t page, uint64_t word);
