/* SPDX-License-Identifier: BSD-3-Clause */
#include "dead.h"

#include <errno.h>
#include <stdlib.h>

#include "index.h"
#include "overwrite.h"

enum { WORD_BITS = 64, RUNS = 64 }; /* runs: passed on in one call */

int dead_init(struct tm_device *device)
{
    const struct store *store = device->file.store;
    if (!store || !store->trims || device->ephemeral)
        return 0;
    device->dead.bits = calloc(device->layout.pages / WORD_BITS + 1, sizeof *device->dead.bits);
    return device->dead.bits ? 0 : ENOMEM;
}

void dead_destroy(struct tm_device *device) { free((void *)device->dead.bits); }

static bool is_in_file(uint64_t word)
{
    switch (word_kind(word)) {
    case TM_NOWHERE:
    case TM_ZERO:
        return false;
    case TM_TMEM: /* a dirty one may be there, too, and older: nothing tells */
        return word & (TM_WORD_CLEAN | TM_WORD_WRITING);
    default:
        return true;
    }
}

void dead_note(struct tm_device *device, uint64_t page, uint64_t word)
{
    struct dead *dead = &device->dead;
    uint64_t bit = UINT64_C(1) << page % WORD_BITS;
    if (dead->bits && is_in_file(word) &&
        !(atomic_fetch_or(&dead->bits[page / WORD_BITS], bit) & bit))
        atomic_fetch_add(&dead->count, 1);
}

static bool take_bit(struct dead *dead, uint64_t page)
{
    uint64_t bit = UINT64_C(1) << page % WORD_BITS;
    if (!(atomic_load(&dead->bits[page / WORD_BITS]) & bit))
        return false;
    atomic_fetch_and(&dead->bits[page / WORD_BITS], ~bit);
    atomic_fetch_sub(&dead->count, 1);
    return true;
}

/* The next page that has one, from `page` on and round; any other if there is none. */
static uint64_t find_next(const struct dead *dead, uint64_t page, uint64_t pages)
{
    for (uint64_t looked = 0; looked < pages + 2 * WORD_BITS; looked += WORD_BITS) {
        uint64_t bits = atomic_load(&dead->bits[page / WORD_BITS]) >> page % WORD_BITS;
        if (bits)
            return page + (uint64_t)__builtin_ctzll(bits);
        page = (page / WORD_BITS + 1) * WORD_BITS;
        page = page < pages ? page : 0;
    }
    return page;
}

/* Have the file forget the pages of [page, end) that are zeros still. */
static int pass(struct tm_device *device, uint64_t page, uint64_t end)
{
    int error = 0;
    for (uint32_t n; page < end && !error; page += n) {
        bool is_dead = word_kind(index_word(device, page)) == TM_ZERO;
        error = overwrite_zeros(device, page, end, &n);
        stats_add(&device->statistics->remote.trims, is_dead && !error ? n : 0);
    }
    return error;
}

int tm_pass_trims(struct tm_device *device, uint64_t *left)
{
    struct dead *dead = &device->dead;
    uint64_t pages = device->layout.pages;
    int error = 0;
    for (int i = 0; i < RUNS && atomic_load(&dead->count) && !error; i++) {
        uint64_t first = find_next(dead, dead->next, pages), end = first;
        while (end < pages && end < first + TM_RUN_MAX && take_bit(dead, end))
            end++;
        error = pass(device, first, end);
        dead->next = end < pages ? end : 0;
    }
    *left = atomic_load(&dead->count);
    return error;
}
