/* SPDX-License-Identifier: BSD-3-Clause */
#include "overwrite.h"

#include <errno.h>

#include "bounce.h"
#include "crc32c.h"
#include "fetch.h"
#include "probes.h"

int overwrite_lock_pages(struct tm_device *device, uint64_t first, uint32_t n)
{
    bool by_blkid = state_all_by_blkid(device, first, n);
    for (;;) {
        bool needs_mark = !by_blkid && !state_is_durable(device);
        int error = needs_mark ? bitmap_set(&device->bitmap, first, n) : 0;
        if (error)
            return error;
        lock_pages(&device->locks, first, n);
        if (by_blkid || state_is_durable(device) || bitmap_is_set(&device->bitmap, first, n))
            return 0;
        unlock_pages(&device->locks, first, n); /* it was cleaned in between, or is kept again */
    }
}

static const uint8_t *page_of(const struct overwrite *run, uint32_t i)
{
    return run->content ? run->content + (size_t)i * TM_PAGE : NULL;
}

static uint32_t crc_of(const uint8_t *content)
{
    static const uint8_t zeros[TM_PAGE];
    return crc32c(0, content ? content : zeros, TM_PAGE);
}

static bool is_stored(const struct overwrite *run, uint32_t i) { return run->stored & page_bit(i); }

static bool is_wanted(struct tm_device *device, const struct overwrite *run, uint32_t i)
{
    if (is_stored(run, i))
        return page_holds(device, run->first + i, page_of(run, i));
    return !run->is_wanted || run->is_wanted(device, run->first + i);
}

/* Mark what is wanted; `before` becomes the words as they were. */
static int mark(struct tm_device *device, struct overwrite *run, uint64_t *before, uint32_t *crcs)
{
    uint32_t i = 0;
    int error = overwrite_lock_pages(device, run->first, run->n);
    if (error)
        return error;
    for (; i < run->n && is_wanted(device, run, i); i++) {
        before[i] = index_word(device, run->first + i);
        crcs[i] = crc_of(page_of(run, i));
        index_update(device, run->first + i, word_writing(before[i], crcs[i]));
    }
    unlock_pages(&device->locks, run->first, run->n);
    run->n = i;
    return 0;
}

static int write_run(struct tm_device *device, const struct overwrite *run)
{
    bool through = state_any_written_through(device, run->first, run->n);
    bool synced = !state_is_durable(device) && state_any_by_blkid(device, run->first, run->n);
    int error = run->content ? file_write(&device->file, run->first, run->n, run->content, through)
                             : file_zero(&device->file, run->first, run->n, run->punch, through);
    if (!error && synced)
        error = file_sync_through(&device->file);
    stats_add(&device->counters->io_errors, error != 0);
    return error;
}

/* Find the pages that a failed write left intact. The others become torn: a word holds no checksum
 * of a mixture. So do all of a write that had no answer in time, for it may come true later. */
static void find_intact(struct tm_device *device, const struct overwrite *run, int error,
                        const uint64_t *before, bool *intact)
{
    struct bounce *bounce = bounce_get();
    bool read = bounce && error != ETIMEDOUT &&
                file_read(&device->file, run->first, run->n, bounce->pages) == 0;
    for (uint32_t i = 0; i < run->n; i++)
        intact[i] = read && !(before[i] & TM_WORD_UNVERIFIED) &&
                    fetch_is_intact(before[i], bounce->pages + (size_t)i * TM_PAGE);
    if (bounce)
        bounce_put(bounce);
}

static void fail(struct tm_device *device, const struct overwrite *run, int error,
                 const uint64_t *before)
{
    bool intact[TM_RUN_MAX];
    find_intact(device, run, error, before, intact);
    lock_pages(&device->locks, run->first, run->n);
    for (uint32_t i = 0; i < run->n; i++) {
        uint64_t page = run->first + i, word = index_word(device, page);
        if (!word_is_writing(word))
            continue;
        if (device->ephemeral) {
            index_set(device, page, state_file_word(device, 0, word_generation(word)));
        } else if (word_kind(before[i]) == TM_FILE) {
            index_set(device, page, intact[i] ? before[i] : TM_TORN);
        } else {
            index_update(device, page, word & ~TM_WORD_WRITING);
            stats_add(&device->stale, 1);
        }
    }
    unlock_pages(&device->locks, run->first, run->n);
}

/* The word of a page that is in the file alone from now on. In an ephemeral pool one that was in
 * tmem is used again; of any other that is still to be said. */
static uint64_t written_word(struct tm_device *device, uint64_t page, uint32_t crc)
{
    uint64_t before = index_word(device, page),
             word = state_file_word(device, crc, state_generation(device));
    if (!device->ephemeral)
        return word;
    return word_kind(before) == TM_TMEM
               ? word_used(word, state_generation(device), true)
               : word_used(word, word_generation(before), before & TM_WORD_AGAIN);
}

/* The file has the page: let the index say so. */
static void complete_page(struct tm_device *device, uint64_t page, const uint8_t *content,
                          uint32_t crc, bool put)
{
    if (content && put && page_put(device, page, content, true))
        return;
    stats_add(&device->counters->spills, content != NULL);
    index_replace(device, page, content ? written_word(device, page, crc) : TM_NOWHERE);
    PROBE(spill, device->name, page, content != NULL);
}

/* A cleaning that began meanwhile may have synced too early: the bitmap is looked at again. */
static int complete(struct tm_device *device, struct overwrite *run, const uint32_t *crcs)
{
    int error = overwrite_lock_pages(device, run->first, run->n);
    if (error)
        return error;
    for (uint32_t i = 0; i < run->n; i++)
        if (word_is_writing(index_word(device, run->first + i))) {
            if (is_stored(run, i))
                index_update(device, run->first + i,
                             word_written(index_word(device, run->first + i)));
            else
                complete_page(device, run->first + i, page_of(run, i), crcs[i], run->put);
            run->n_completed++;
        }
    for (uint32_t i = 0; run->words && i < run->n; i++)
        run->words[i] = index_word(device, run->first + i);
    unlock_pages(&device->locks, run->first, run->n);
    return 0;
}

int overwrite_locked(struct tm_device *device, struct overwrite *run)
{
    uint64_t before[TM_RUN_MAX], start = stats_now();
    uint32_t crcs[TM_RUN_MAX];
    run->n_completed = 0;
    int error = mark(device, run, before, crcs);
    if (error || !run->n)
        return error;
    error = write_run(device, run);
    if (!error)
        error = complete(device, run, crcs);
    if (error)
        fail(device, run, error, before);
    else if (run->content && !run->put)
        stats_took(&device->statistics->spill, start);
    return error;
}

int overwrite_run(struct tm_device *device, struct overwrite *run)
{
    struct io_range io = {.first = run->first, .n = run->n};
    lock_io(&device->locks, &io);
    int error = overwrite_locked(device, run);
    unlock_io(&device->locks, &io);
    return error;
}

static bool lacks_zeros(const struct tm_device *device, uint64_t page)
{
    enum kind kind = word_kind(index_word(device, page));
    return kind == TM_ZERO || (kind == TM_LOST && device->lost_zero);
}

int overwrite_zeros(struct tm_device *device, uint64_t first, uint64_t end, uint32_t *n)
{
    struct overwrite zeros = {
        .first = first, .punch = device->file.store->trims, .is_wanted = lacks_zeros};
    *n = 1;
    if (!lacks_zeros(device, first))
        return 0;
    zeros.n = state_alike_run(device, first, end - first);
    int error = overwrite_run(device, &zeros);
    *n = zeros.n ? zeros.n : 1;
    return error;
}
