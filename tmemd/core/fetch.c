/* SPDX-License-Identifier: BSD-3-Clause */
#include "fetch.h"

#include <errno.h>
#include <string.h>

#include "bounce.h"
#include "crc32c.h"

static void count_file_read(struct tm_device *device, uint64_t word)
{
    stats_add(&device->counters->file_reads, 1);
    stats_add(&device->statistics->file_reads_by_age[state_age(device, word)], 1);
}

bool fetch_is_intact(uint64_t word, const uint8_t *content)
{
    return word_matches(word, crc32c(0, content, TM_PAGE));
}

static int read_file(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *buffer)
{
    uint64_t start = stats_now();
    int error = file_read(&device->file, first, n, buffer);
    if (error)
        stats_add(&device->counters->io_errors, 1);
    else
        stats_took(&device->statistics->file_read, start);
    return error;
}

/* Read one page from the file under its I/O lock: nothing is being written there. */
static int read_file_page(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, page, 1, bounce->pages);
    bool is_known = !(word & TM_WORD_UNVERIFIED) && !device->ephemeral;
    if (!error && is_known && !fetch_is_intact(word, bounce->pages)) {
        stats_add(&device->counters->bad_checksums, 1);
        error = EIO;
    }
    if (!error)
        memcpy(content, bounce->pages, TM_PAGE);
    bounce_put(bounce);
    return error;
}

int fetch_page(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    int error = page_get(device, page, content, word);
    if (error != EAGAIN)
        return error;
    count_file_read(device, *word);
    return read_file_page(device, page, *word, content);
}

static int wait_and_fetch(struct tm_device *device, uint64_t page, uint8_t *content)
{
    struct io_range io = {.first = page, .n = 1};
    uint64_t word;
    lock_io(&device->locks, &io);
    int error = fetch_page(device, page, content, &word);
    unlock_io(&device->locks, &io);
    return error;
}

bool fetch_is_right(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content)
{
    bool is_unknown = word & TM_WORD_UNVERIFIED && !word_is_writing(word);
    return is_unknown ? word_same_content(index_word(device, page), word)
                      : fetch_is_intact(word, content);
}

/* Use a page that was read without a lock, or read it again. */
static int take(struct tm_device *device, uint64_t page, uint64_t *word, const uint8_t *read,
                uint8_t *content)
{
    if (read && fetch_is_right(device, page, *word, read)) {
        count_file_read(device, *word);
        memcpy(content, read, TM_PAGE);
        return 0;
    }
    int error = wait_and_fetch(device, page, content);
    *word |= TM_WORD_WRITING;
    return error;
}

/* Fetch a stretch in one read. If it fails it may be for what lies between the pages. */
static int fetch_stretch(struct tm_device *device, uint64_t first, struct stretch stretch,
                         page_set missing, uint64_t *words, uint8_t *content)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, first + stretch.start, stretch.n, bounce->pages);
    bool is_read = !error;
    if (error != ETIMEDOUT && stretch_has_gaps(missing, stretch))
        error = 0;
    for (uint32_t i = stretch.start; i < stretch.start + stretch.n && !error; i++)
        if (missing & page_bit(i))
            error = take(device, first + i, &words[i],
                         is_read ? bounce->pages + (size_t)(i - stretch.start) * TM_PAGE : NULL,
                         content + (size_t)i * TM_PAGE);
    bounce_put(bounce);
    return error;
}

/* Where some pages lie apart, the rest may be away: then none is read that is not needed. */
static uint32_t most_between(const struct tm_device *device)
{
    const _Atomic uint64_t *apart = device->file.store->apart;
    return apart && atomic_load(apart) ? 0 : STRETCH_GAP;
}

int fetch_pages(struct tm_device *device, uint64_t first, page_set missing, uint64_t *words,
                uint8_t *content)
{
    int error = 0;
    while (missing && !error) {
        struct stretch stretch = stretch_first(missing, most_between(device));
        error = fetch_stretch(device, first, stretch, missing, words, content);
        missing = pages_after(missing, stretch.start + stretch.n);
    }
    return error;
}
