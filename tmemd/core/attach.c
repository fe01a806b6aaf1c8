/* SPDX-License-Identifier: BSD-3-Clause */
/* In this order: the index is allocated; allocated memory is found, the rest punched; states of
 * blocks become words; each word is checked and counted, and its slot claimed; what no slot needs
 * is given back. */
#define _GNU_SOURCE
#include "attach.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "index.h"

enum { INDEX_STEP = 1 << 20 }; /* bytes of the index allocated at once */

/* The first byte at or after `at` that is data (or hole), but no further than `end`. */
static int seek(int fd, uint64_t at, uint64_t end, int whence, uint64_t *found)
{
    off_t offset = lseek(fd, (off_t)at, whence);
    if (offset < 0 && errno != ENXIO)
        return errno;
    *found = offset < 0 || (uint64_t)offset > end ? end : (uint64_t)offset;
    return 0;
}

/* Allocate [from, to) of the index and write it: SEEK_DATA skips allocated pages never written. */
static int allocate_index(struct tm_device *device, uint64_t from, uint64_t to)
{
    int error = 0;
    for (uint64_t n; from < to && !error; from += n) {
        n = to - from < INDEX_STEP ? to - from : INDEX_STEP;
        error = budget_allocate(&device->budget, from, n, device->budget.limit);
        if (!error)
            memset(device->base + from, 0, n);
    }
    return error;
}

static int complete_index(struct tm_device *device)
{
    uint64_t at = device->layout.index_offset, end = at + device->layout.blocks * TM_PAGE, hole = 0,
             data = 0;
    for (; at < end; at = data) {
        int error = seek(device->pool_fd, at, end, SEEK_HOLE, &hole);
        if (!error)
            error = seek(device->pool_fd, hole, end, SEEK_DATA, &data);
        if (error)
            return error;
        stats_add(&device->counters->used, hole - at);
        error = allocate_index(device, hole, data);
        if (error)
            return error;
    }
    atomic_store(&device->counters->index_bytes, device->layout.blocks * TM_PAGE);
    return 0;
}

/* Find the allocated pages of the data area; punch the gaps, which may hold allocated pages that
 * were never written. */
static int find_allocated(struct tm_device *device)
{
    uint64_t start = device->layout.data_offset, end = start + device->layout.data_bytes;
    for (uint64_t at = start, data = start, hole = start; at < end; at = hole) {
        int error = seek(device->pool_fd, at, end, SEEK_DATA, &data);
        if (!error && data > at)
            error = budget_punch(&device->budget, at, data - at);
        if (!error)
            error = seek(device->pool_fd, data, end, SEEK_HOLE, &hole);
        if (error)
            return error;
        stats_add(&device->counters->used, hole - data);
        slots_adopt_allocated(&device->slots, data - start, hole - data);
    }
    return 0;
}

static int adopt_memory(struct tm_device *device)
{
    struct tm_counters *counters = device->counters;
    atomic_store(&counters->used, device->layout.index_offset);
    atomic_store(&counters->pages_in_tmem, 0);
    atomic_store(&counters->pages_in_file, 0);
    atomic_store(&counters->pages_lost, 0);
    atomic_store(&counters->payload_bytes, 0);
    atomic_store(&counters->index_bytes, 0);
    int error = complete_index(device);
    return error ? error : find_allocated(device);
}

/* The word that a page of a block in this state has. Pages that blkid reads are never lost. */
static uint64_t state_word(const struct tm_device *device, uint8_t state, uint64_t page)
{
    bool in_file = state == TM_STATE_FILE || state_is_read_by_blkid(device, page);
    return state == TM_STATE_ZERO ? TM_ZERO : in_file ? TM_FILE | TM_WORD_UNVERIFIED : TM_LOST;
}

/* Write a block's state into its index words. If it is killed on the way it is done again. */
static bool expand_block(struct tm_device *device, uint64_t block)
{
    uint8_t state = atomic_load(&device->states[block]);
    uint64_t first = block * TM_BLOCK_PAGES, end = first + index_block_pages(device, block);
    if (state == TM_STATE_INDEX)
        return true;
    if ((state > TM_STATE_ZERO && !device->ephemeral) || !state_has_file(device))
        return false;
    for (uint64_t page = first; page < end; page++)
        atomic_store_explicit(&device->index[page], state_word(device, state, page),
                              memory_order_relaxed);
    atomic_store_explicit(&device->states[block], TM_STATE_INDEX, memory_order_release);
    return true;
}

static bool is_valid(struct tm_device *device, uint64_t word)
{
    uint32_t length = word_length(word);
    switch (word_kind(word)) {
    case TM_NOWHERE:
    case TM_ZERO:
        return true;
    case TM_FILE:
    case TM_LOST:
    case TM_TORN:
        return state_has_file(device);
    case TM_TMEM:
        return length >= 1 && length <= TM_PAGE && word_encoding(word) <= TM_SAME &&
               word_location(word) < device->layout.data_bytes &&
               slots_claim(&device->slots, word_slot_size(length), word_location(word));
    default:
        return false;
    }
}

/* Whether the file is known to hold what the page holds: a write that was killed has cleared CLEAN,
 * or left a page in doubt. */
static bool is_sure(uint64_t word)
{
    enum kind kind = word_kind(word);
    return word == TM_NOWHERE || (kind == TM_TMEM && word & TM_WORD_CLEAN) ||
           (kind == TM_FILE && !word_is_in_doubt(word));
}

/* Count the page, claim its slot, and note what the file lacks. The mark of a write that was killed
 * goes, except from file pages, which hold old or new content. A page of an ephemeral pool whose
 * word is not to be trusted is read from the file again, and all that are in the file alone get
 * versions of this process. Returns 0 or an errno; EINVAL for a word that cannot be. */
static int adopt_page(struct tm_device *device, uint64_t page)
{
    uint64_t word = index_word(device, page);
    if (word_is_writing(word) && !word_is_in_doubt(word))
        atomic_store(&device->index[page], word &= ~TM_WORD_WRITING);
    bool valid = (!device->ephemeral || is_sure(word)) && is_valid(device, word);
    if (!valid && !device->ephemeral)
        return EINVAL;
    if (!valid || (device->ephemeral && word_kind(word) == TM_FILE))
        atomic_store(&device->index[page],
                     word = state_file_word(device, 0, valid ? word_generation(word) : 0));
    index_account(device, TM_NOWHERE, word);
    if (state_is_stale(device, page, word))
        stats_add(&device->stale, 1);
    bool lacking = !state_is_in_file(device, word) && !state_is_written_through(device, page);
    return lacking ? bitmap_set(&device->bitmap, page, 1) : 0;
}

int attach_index(struct tm_device *device, char *error, size_t error_size)
{
    int failed = adopt_memory(device);
    if (failed) {
        snprintf(error, error_size, "its pages' memory cannot be found or allocated: %s",
                 strerror(failed));
        return failed;
    }
    for (uint64_t block = 0; block < device->layout.blocks; block++)
        if (!expand_block(device, block)) {
            snprintf(error, error_size, "block %" PRIu64 " is in no known state", block);
            return EINVAL;
        }
    for (uint64_t page = 0; page < device->layout.pages && !failed; page++) {
        failed = adopt_page(device, page);
        if (failed == EINVAL)
            snprintf(error, error_size, "the index contradicts itself at page %" PRIu64, page);
    }
    if (!failed)
        slots_finish(&device->slots);
    return failed;
}
