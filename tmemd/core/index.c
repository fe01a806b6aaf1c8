/* SPDX-License-Identifier: BSD-3-Clause */
#include "index.h"

uint32_t index_block_pages(const struct tm_device *device, uint64_t block)
{
    uint64_t left = device->layout.pages - block * TM_BLOCK_PAGES;
    return left < TM_BLOCK_PAGES ? (uint32_t)left : TM_BLOCK_PAGES;
}

static uint64_t payload_bytes(uint64_t word)
{
    return word_kind(word) == TM_TMEM ? word_length(word) : 0;
}

/* The counter of pages of this kind; NULL: not counted. */
static _Atomic uint64_t *pages_counter(struct tm_counters *counters, uint64_t word)
{
    switch (word_kind(word)) {
    case TM_TMEM:
        return &counters->pages_in_tmem;
    case TM_FILE:
        return &counters->pages_in_file;
    case TM_LOST:
    case TM_TORN:
        return &counters->pages_lost;
    default:
        return NULL;
    }
}

/* The counters' cache lines travel between the cores: what is the same is left alone. */
void index_account(struct tm_device *device, uint64_t old, uint64_t new)
{
    struct tm_counters *counters = device->counters;
    _Atomic uint64_t *from = pages_counter(counters, old), *to = pages_counter(counters, new);
    if (from != to && from)
        stats_sub(from, 1);
    if (from != to && to)
        stats_add(to, 1);
    if (payload_bytes(old) != payload_bytes(new))
        stats_add(&counters->payload_bytes, payload_bytes(new) - payload_bytes(old));
    ages_change(&device->ages, old, new);
}

void index_update_locked(struct tm_device *device, uint64_t page, uint64_t word)
{
    uint64_t old = index_word(device, page);
    atomic_store_explicit(&device->index[page], word, memory_order_release);
    ages_change(&device->ages, old, word);
}

void index_update(struct tm_device *device, uint64_t page, uint64_t word)
{
    lock_entry(&device->locks, page);
    index_update_locked(device, page, word);
    unlock_entry(&device->locks, page);
}

uint64_t index_set(struct tm_device *device, uint64_t page, uint64_t word)
{
    lock_entry(&device->locks, page);
    uint64_t old = index_word(device, page);
    atomic_store_explicit(&device->index[page], word, memory_order_release);
    unlock_entry(&device->locks, page);
    index_account(device, old, word);
    if (word_is_ahead(old) && !word_is_ahead(word))
        stats_add(&device->counters->prefetch_wastes, 1);
    if (word_kind(old) ==
        TM_TMEM) /* nobody looks at it any more: whoever did held the entry lock */
        slots_free(&device->slots, word_slot_size(word_length(old)), word_location(old));
    return old;
}

void index_replace(struct tm_device *device, uint64_t page, uint64_t word)
{
    uint64_t old = index_set(device, page, word);
    if (word_kind(old) == TM_TMEM)
        stats_add(&device->counters->invalidates, 1);
    if (word_kind(old) == TM_TMEM || word_kind(old) == TM_FILE)
        stats_add(&device->statistics->freed_by_age[state_age(device, old)], 1);
}
