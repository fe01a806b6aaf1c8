/* SPDX-License-Identifier: BSD-3-Clause */
#include "clean.h"

#include <errno.h>

#include "bounce.h"
#include "crc32c.h"
#include "fetch.h"
#include "overwrite.h"

static uint64_t region_end(const struct tm_device *device, uint64_t region)
{
    uint64_t end = (region + 1) * device->bitmap.region_pages;
    return end < device->layout.pages ? end : device->layout.pages;
}

/* Find out which of the two an undecided page is. One that is damaged stays as it is. */
static void resolve(struct tm_device *device, uint64_t page)
{
    uint8_t content[TM_PAGE];
    struct io_range io = {.first = page, .n = 1};
    uint64_t word;
    lock_io(&device->locks, &io);
    bool known = fetch_page(device, page, content, &word) == 0;
    lock_pages(&device->locks, page, 1);
    if (known && word_is_in_doubt(word) && word_same_content(index_word(device, page), word))
        index_set(device, page, word_of_file(crc32c(0, content, TM_PAGE), word_generation(word)));
    unlock_pages(&device->locks, page, 1);
    unlock_io(&device->locks, &io);
}

/* Decide what is undecided in a region, and write the zeros that the file lacks. */
static int complete_region(struct tm_device *device, uint64_t region)
{
    uint64_t page = region * device->bitmap.region_pages, end = region_end(device, region);
    int error = 0;
    for (uint32_t n; page < end && !error; page += n) {
        if (word_is_in_doubt(index_word(device, page)))
            resolve(device, page);
        error = overwrite_zeros(device, page, end, &n);
    }
    return error;
}

static void keep_unless_in_file(struct tm_device *device, uint64_t region)
{
    uint64_t page = region * device->bitmap.region_pages, end = region_end(device, region);
    while (page < end && state_is_in_file(device, index_word(device, page)))
        page++;
    if (page < end)
        bitmap_keep(&device->bitmap, region);
}

int clean_regions(struct tm_device *device)
{
    struct bitmap *bitmap = &device->bitmap;
    int error = 0;
    for (uint64_t region = 0; region < bitmap->n && !error; region++)
        if (bitmap_region_is_set(bitmap, region))
            error = complete_region(device, region);
    if (error)
        return error;
    bitmap_begin_cleaning(bitmap);
    locks_wait_for_pages(&device->locks);
    for (uint64_t region = 0; region < bitmap->n; region++)
        keep_unless_in_file(device, region);
    error = file_sync(&device->file);
    for (uint64_t region = 0; error && region < bitmap->n; region++)
        bitmap_keep(bitmap, region);
    return error ? error : bitmap_finish_cleaning(bitmap);
}

/* Under the page's I/O lock; pages that are written through change only under it. */
static int resync_locked(struct tm_device *device, uint64_t page, uint8_t *content)
{
    uint64_t word = index_word(device, page);
    struct overwrite run = {.first = page, .n = 1};
    if (!state_is_stale(device, page, word))
        return 0;
    if (word_kind(word) == TM_TMEM) {
        if (!page_copy_out(device, page, content, &word))
            return 0; /* damaged: an error whatever the file holds */
        run.content = content;
        run.put = true;
    }
    return overwrite_locked(device, &run);
}

static int resync_page(struct tm_device *device, uint64_t page, uint8_t *content)
{
    struct io_range io = {.first = page, .n = 1};
    lock_io(&device->locks, &io);
    int error = resync_locked(device, page, content);
    unlock_io(&device->locks, &io);
    return error;
}

static int resync_pages(struct tm_device *device)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    int error = 0;
    uint64_t end = device->layout.pages;
    uint32_t n;
    for (uint64_t page = 0; page < end && !error; page += n) {
        bool is_stale = state_is_stale(device, page, index_word(device, page));
        n = 1;
        if (is_stale)
            error = overwrite_zeros(device, page, end, &n);
        if (is_stale && !error)
            error = resync_page(device, page, bounce->pages);
    }
    bounce_put(bounce);
    return error ? error : file_sync_through(&device->file);
}

int clean_resync(struct tm_device *device)
{
    pthread_mutex_lock(&device->demote_lock);
    uint64_t stale = atomic_load(&device->stale);
    int error = stale ? resync_pages(device) : 0;
    if (!error)
        atomic_fetch_sub(&device->stale, stale);
    pthread_mutex_unlock(&device->demote_lock);
    return error;
}

static int flush_inside(struct tm_device *device)
{
    stats_add(&device->counters->flushes, 1);
    int error = atomic_load(&device->stale) ? clean_resync(device) : 0;
    if (!state_is_durable(device))
        return 0;
    if (!error) /* all that is in a source was written through */
        error = device->ephemeral ? file_sync_through(&device->file) : file_sync(&device->file);
    stats_add(&device->counters->io_errors, error != 0);
    return error;
}

int tm_flush(struct tm_device *device)
{
    if (!fence_enter(&device->fence))
        return EIO;
    int error = flush_inside(device);
    fence_leave(&device->fence);
    return error;
}

int tm_stop(struct tm_device *device)
{
    fence_stop(&device->fence);
    return flush_inside(device);
}
