/* SPDX-License-Identifier: BSD-3-Clause */
#include "recheck.h"

#include <errno.h>
#include <string.h>

#include "bounce.h"
#include "fetch.h"

/* Whether the word says what the file holds. */
static bool is_claim(uint64_t word)
{
    enum kind kind = word_kind(word);
    return kind == TM_NOWHERE || (kind == TM_FILE && !(word & TM_WORD_UNVERIFIED)) ||
           (kind == TM_TMEM && word & TM_WORD_CLEAN);
}

/* The word that the page has in truth, if the file holds `found`. */
static uint64_t true_word(struct tm_device *device, uint64_t page, uint64_t word,
                          const uint8_t *found)
{
    uint8_t content[TM_PAGE];
    uint64_t copied;
    if (!is_claim(word))
        return word;
    switch (word_kind(word)) {
    case TM_NOWHERE:
        return page_is_zero(found) ? word : TM_ZERO;
    case TM_FILE:
        return fetch_is_intact(word, found) ? word : TM_TORN;
    case TM_TMEM:
        if (!page_copy_out(device, page, content, &copied) || memcmp(content, found, TM_PAGE) == 0)
            return word;
        return word & ~TM_WORD_CLEAN;
    default:
        return word;
    }
}

/* The page's I/O lock is held: it may be put, but nothing is written to the file. */
static void recheck_page(struct tm_device *device, uint64_t page, const uint8_t *found)
{
    lock_pages(&device->locks, page, 1);
    uint64_t word = index_word(device, page), right = true_word(device, page, word, found);
    if (word_kind(right) == TM_TMEM && right != word)
        index_update(device, page, right);
    else if (right != word)
        index_set(device, page, right);
    stats_add(&device->counters->bad_checksums, right == TM_TORN && word != TM_TORN);
    unlock_pages(&device->locks, page, 1);
}

static page_set find_claims(const struct tm_device *device, uint64_t first, uint32_t n)
{
    page_set claims = 0;
    for (uint32_t i = 0; i < n; i++)
        claims |= is_claim(index_word(device, first + i)) ? page_bit(i) : 0;
    return claims;
}

static int recheck_stretch(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    int error = file_read(&device->file, first, n, content);
    for (uint32_t i = 0; i < n && !error; i++)
        recheck_page(device, first + i, content + (size_t)i * TM_PAGE);
    return error;
}

static int recheck_run(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    struct io_range io = {.first = first, .n = n};
    int error = 0;
    lock_io(&device->locks, &io);
    page_set claims = find_claims(device, first, n);
    while (claims && !error) {
        struct stretch stretch = stretch_first(claims, STRETCH_GAP);
        error = recheck_stretch(device, first + stretch.start, stretch.n, content);
        claims = pages_after(claims, stretch.start + stretch.n);
    }
    unlock_io(&device->locks, &io);
    return error;
}

static int recheck_region(struct tm_device *device, uint64_t region, uint8_t *content)
{
    uint64_t page = region * device->bitmap.region_pages, end = page + device->bitmap.region_pages;
    int error = 0;
    if (end > device->layout.pages)
        end = device->layout.pages;
    for (uint32_t n; page < end && !error; page += n) {
        n = end - page < TM_RUN_MAX ? (uint32_t)(end - page) : TM_RUN_MAX;
        error = recheck_run(device, page, n, content);
    }
    return error;
}

int recheck_file(struct tm_device *device)
{
    struct store *store = device->file.store;
    if (!store->unsure || !atomic_load(store->unsure))
        return 0;
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    atomic_store(store->unsure, false); /* before the first look */
    int error = 0;
    for (uint64_t region = 0; region < device->bitmap.n && !error; region++)
        if (bitmap_region_is_set(&device->bitmap, region))
            error = recheck_region(device, region, bounce->pages);
    if (error)
        atomic_store(store->unsure, true);
    bounce_put(bounce);
    return !error && atomic_load(store->unsure) ? EAGAIN : error;
}
