#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

enum { INDEX_STEP = 1 << 20 }; /* bytes of the index allocated at once */

uint32_t tm_block_pages(const struct tm_device *device, uint64_t block)
{
    uint64_t left = device->layout.pages - block * TM_BLOCK_PAGES;
    return left < TM_BLOCK_PAGES ? (uint32_t)left : TM_BLOCK_PAGES;
}

uint64_t tm_word(const struct tm_device *device, uint64_t page)
{
    return atomic_load_explicit(&device->index[page], memory_order_acquire);
}

static uint64_t payload_bytes(uint64_t word) { return tm_kind(word) == TM_TMEM ? tm_length(word) : 0; }

/* The counter of pages of this kind; NULL: not counted. */
static _Atomic uint64_t *pages_counter(struct tm_device *device, uint64_t word)
{
    switch (tm_kind(word)) {
    case TM_TMEM:
        return &device->counters->pages_in_tmem;
    case TM_FILE:
        return &device->counters->pages_in_file;
    case TM_LOST:
    case TM_TORN:
        return &device->counters->pages_lost;
    default:
        return NULL;
    }
}

/* Count n pages with this word by age: 1, or -1 for one that is not there any more. */
static void count_by_age(struct tm_ages *ages, uint64_t word, int64_t n)
{
    unsigned generation = tm_generation(word);
    if (tm_kind(word) == TM_TMEM) {
        uint64_t bytes = (uint64_t)n * tm_slot_size(tm_length(word));
        tm_count(&ages->stored[generation], bytes);
        if (tm_encoding(word) == TM_RAW)
            tm_count(&ages->raw[generation], bytes);
        if (word & TM_WORD_CLEAN)
            tm_count(&ages->copied[generation], bytes);
    } else if (tm_kind(word) == TM_FILE) {
        tm_count(&ages->filed[generation], (uint64_t)n);
    }
}

/* Account by age for a page whose word in the index changes, or which enters or leaves the index (TM_NOWHERE). */
static void change_age(struct tm_device *device, uint64_t old, uint64_t new)
{
    if (tm_same_age(old, new))
        return;
    count_by_age(&device->ages, new, 1); /* first: no page may seem to be nowhere */
    count_by_age(&device->ages, old, -1);
}

/* Account for a page whose word changes. The counters' cache lines travel between the cores: what is the same is left alone. */
static void count_change(struct tm_device *device, uint64_t old, uint64_t new)
{
    _Atomic uint64_t *from = pages_counter(device, old), *to = pages_counter(device, new);
    if (from != to && from)
        tm_uncount(from, 1);
    if (from != to && to)
        tm_count(to, 1);
    if (payload_bytes(old) != payload_bytes(new))
        tm_count(&device->counters->payload_bytes, payload_bytes(new) - payload_bytes(old));
}

/* Account for a page whose content changes. */
static void count_freed(struct tm_device *device, uint64_t old)
{
    if (tm_kind(old) == TM_TMEM)
        tm_count(&device->counters->invalidates, 1);
    if (tm_kind(old) == TM_TMEM || tm_kind(old) == TM_FILE)
        tm_count(&device->statistics->freed_by_age[tm_age_of(device, old)], 1);
}

static void free_slot(struct tm_device *device, uint64_t word)
{
    if (tm_kind(word) == TM_TMEM)
        tm_slot_free(&device->slots, tm_slot_size(tm_length(word)), tm_location(word));
}

void tm_touch(struct tm_device *device, uint64_t page, uint64_t word)
{
    uint64_t old = atomic_load_explicit(&device->index[page], memory_order_relaxed);
    atomic_store_explicit(&device->index[page], word, memory_order_release);
    change_age(device, old, word);
}

uint64_t tm_publish(struct tm_device *device, uint64_t page, uint64_t word)
{
    tm_look(&device->locks, page);
    uint64_t old = atomic_load_explicit(&device->index[page], memory_order_relaxed);
    atomic_store_explicit(&device->index[page], word, memory_order_release);
    tm_unlook(&device->locks, page);
    count_change(device, old, word);
    change_age(device, old, word);
    free_slot(device, old); /* nobody looks at it any more: whoever did held the look lock */
    return old;
}

void tm_replace(struct tm_device *device, uint64_t page, uint64_t word)
{
    count_freed(device, tm_publish(device, page, word));
}

/* The first byte at or after `at` that is data (or hole), but no further than `end`. */
static int seek(int fd, uint64_t at, uint64_t end, int whence, uint64_t *found)
{
    off_t offset = lseek(fd, (off_t)at, whence);
    if (offset < 0 && errno != ENXIO)
        return errno;
    *found = offset < 0 || (uint64_t)offset > end ? end : (uint64_t)offset;
    return 0;
}

/* Call visit for each written run of [start, end) of the pool file. What lies between may have been allocated for a write
 * that never came, which SEEK_DATA does not see: it is punched out. */
static int each_allocated(struct tm_device *device, uint64_t start, uint64_t end,
                          void (*visit)(struct tm_device *, uint64_t offset, uint64_t bytes))
{
    for (uint64_t at = start, data = start, hole = start; at < end; at = hole) {
        int error = seek(device->pool_fd, at, end, SEEK_DATA, &data);
        if (!error && data > at)
            error = tm_punch(device->pool_fd, at, data - at);
        if (!error)
            error = seek(device->pool_fd, data, end, SEEK_HOLE, &hole);
        if (error)
            return error;
        if (hole > data)
            visit(device, data, hole - data);
    }
    return 0;
}

/* Allocate [from, to) of the index and touch it, for what is not written SEEK_DATA does not see. */
static int take_index(struct tm_device *device, uint64_t from, uint64_t to)
{
    int error = 0;
    for (uint64_t n; from < to && !error; from += n) {
        n = to - from < INDEX_STEP ? to - from : INDEX_STEP;
        error = tm_take(&device->budget, device->pool_fd, from, n, device->budget.limit);
        if (!error)
            memset(device->base + from, 0, n);
    }
    return error;
}

/* Allocate what is missing of the index: all of it, within the limit, so that no later change fails for want of memory. */
static int complete_index(struct tm_device *device)
{
    uint64_t at = device->layout.index_offset, end = at + device->layout.blocks * TM_PAGE, hole = 0, data = 0;
    for (; at < end; at = data) {
        int error = seek(device->pool_fd, at, end, SEEK_HOLE, &hole);
        if (!error)
            error = seek(device->pool_fd, hole, end, SEEK_DATA, &data);
        if (error)
            return error;
        tm_count(&device->counters->used, hole - at);
        error = take_index(device, hole, data);
        if (error)
            return error;
    }
    atomic_store(&device->counters->index_bytes, device->layout.blocks * TM_PAGE);
    return 0;
}

static void adopt_data_pages(struct tm_device *device, uint64_t offset, uint64_t bytes)
{
    tm_count(&device->counters->used, bytes);
    tm_slots_backed(&device->slots, offset - device->layout.data_offset, bytes);
}

static bool is_valid(struct tm_device *device, uint64_t word)
{
    bool needs_file = tm_kind(word) == TM_FILE || tm_kind(word) == TM_LOST || tm_kind(word) == TM_TORN;
    if (tm_kind(word) > TM_TORN || (needs_file && !tm_has_file(device)))
        return false;
    if (tm_kind(word) != TM_TMEM)
        return true;
    uint32_t length = tm_length(word);
    return length >= 1 && length <= TM_PAGE && tm_encoding(word) <= TM_SAME &&
           tm_location(word) < device->layout.data_bytes &&
           tm_slots_claim(&device->slots, tm_slot_size(length), tm_location(word));
}

/* The word that a page of a block in this state has. Pages that blkid reads are never lost. */
static uint64_t state_word(const struct tm_device *device, uint8_t state, uint64_t page)
{
    bool in_file = state == TM_STATE_FILE || tm_is_probed(device->layout.pages, page);
    return state == TM_STATE_ZERO ? TM_ZERO : in_file ? TM_FILE | TM_WORD_UNVERIFIED : TM_LOST;
}

/* Spell out in the index what its state says of a block. Killed before it is done, it is done again. */
static void spell_out(struct tm_device *device, uint64_t block, uint8_t state)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    for (uint64_t page = first; page < first + tm_block_pages(device, block); page++)
        atomic_store_explicit(&device->index[page], state_word(device, state, page), memory_order_relaxed);
    atomic_store_explicit(&device->states[block], TM_STATE_INDEX, memory_order_release);
}

/* The page's word, without the mark of a write to the file that ended with the process before. A page that is only in the file
 * keeps it: it is old or new. */
static uint64_t adopt_word(struct tm_device *device, uint64_t page)
{
    uint64_t word = tm_word(device, page);
    if (word & TM_WORD_WRITING && tm_kind(word) != TM_FILE)
        atomic_store(&device->index[page], word &= ~TM_WORD_WRITING);
    return word;
}

/* Count the pages and claim their slots; returns the first page whose word cannot be, or UINT64_MAX. */
static uint64_t adopt_pages(struct tm_device *device)
{
    for (uint64_t page = 0; page < device->layout.pages; page++) {
        uint64_t word = adopt_word(device, page);
        if (!is_valid(device, word))
            return page;
        count_change(device, TM_NOWHERE, word);
        change_age(device, TM_NOWHERE, word);
    }
    return UINT64_MAX;
}

static void forget_counts(struct tm_counters *counters, uint64_t used)
{
    atomic_store(&counters->used, used);
    atomic_store(&counters->pages_in_tmem, 0);
    atomic_store(&counters->pages_in_file, 0);
    atomic_store(&counters->pages_lost, 0);
    atomic_store(&counters->payload_bytes, 0);
    atomic_store(&counters->index_bytes, 0);
}

/* Find what the pool has allocated, and the rest of the index. */
static int adopt_memory(struct tm_device *device)
{
    const struct tm_layout *layout = &device->layout;
    forget_counts(device->counters, layout->index_offset);
    int error = complete_index(device);
    return error ? error
                 : each_allocated(device, layout->data_offset, layout->data_offset + layout->data_bytes,
                                  adopt_data_pages);
}

int tm_index_attach(struct tm_device *device, char *error, size_t error_size)
{
    int failed = adopt_memory(device);
    if (failed) {
        snprintf(error, error_size, "no memory for the index: %s", strerror(failed));
        return failed;
    }
    for (uint64_t block = 0; block < device->layout.blocks; block++) {
        uint8_t state = atomic_load(&device->states[block]);
        if (state > TM_STATE_ZERO || (state != TM_STATE_INDEX && !tm_has_file(device))) {
            snprintf(error, error_size, "block %" PRIu64 " is in no known state", block);
            return EINVAL;
        }
        if (state != TM_STATE_INDEX)
            spell_out(device, block, state);
    }
    uint64_t bad = adopt_pages(device);
    if (bad != UINT64_MAX) {
        snprintf(error, error_size, "the index contradicts itself at page %" PRIu64, bad);
        return EINVAL;
    }
    tm_slots_finish(&device->slots);
    return 0;
}
