#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "device.h"

/* What is demoted and compacted to let the index grow by a page where its reserve is used up or the host has no memory. */
enum { ROOM_BYTES = 64 * TM_PAGE, ROOM_MOVES = 4096, ROOM_ATTEMPTS = 4 };

uint32_t tm_block_pages(const struct tm_device *device, uint64_t block)
{
    uint64_t left = device->layout.pages - block * TM_BLOCK_PAGES;
    return left < TM_BLOCK_PAGES ? (uint32_t)left : TM_BLOCK_PAGES;
}

bool tm_has_written_through(const struct tm_device *device, uint64_t block)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    for (uint64_t page = first; page < first + tm_block_pages(device, block); page++)
        if (tm_is_written_through(device, page))
            return true;
    return false;
}

/* The word that a page of a block in this state has. */
static uint64_t state_word(const struct tm_device *device, uint8_t state, uint64_t page)
{
    switch (state) {
    case TM_STATE_FILE:
        return TM_FILE | TM_WORD_FLAG;
    case TM_STATE_LOST:
        return tm_is_written_through(device, page) ? TM_FILE | TM_WORD_FLAG : TM_LOST;
    case TM_STATE_ZERO:
        return TM_ZERO;
    default:
        return TM_NOWHERE;
    }
}

uint64_t tm_word(struct tm_device *device, uint64_t page)
{
    uint8_t state = atomic_load_explicit(&device->blocks[page / TM_BLOCK_PAGES], memory_order_acquire);
    return state == TM_BLOCK_IN_INDEX ? atomic_load_explicit(&device->index[page], memory_order_acquire)
                                      : state_word(device, state, page);
}

uint64_t tm_peek(struct tm_device *device, uint64_t page)
{
    tm_look(&device->locks, page);
    uint64_t word = tm_word(device, page);
    tm_unlook(&device->locks, page);
    return word;
}

bool tm_copy_words(struct tm_device *device, uint64_t block, uint64_t *words)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    if (!tm_in_index(device, block))
        return false;
    tm_look(&device->locks, first); /* keeps the words there */
    bool present = tm_in_index(device, block);
    for (uint32_t i = 0; present && i < tm_block_pages(device, block); i++)
        words[i] = atomic_load_explicit(&device->index[first + i], memory_order_relaxed);
    tm_unlook(&device->locks, first);
    return present;
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
        if (word & TM_WORD_FLAG)
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
    if (!tm_in_index(device, page / TM_BLOCK_PAGES))
        return;
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

/* A word that says the same of the page, but vouches for nothing in the file. */
static uint64_t without_file(uint64_t word)
{
    switch (tm_kind(word)) {
    case TM_NOWHERE:
        return TM_ZERO;
    case TM_TMEM:
        return word & ~TM_WORD_FLAG;
    case TM_FILE:
        return tm_file_word(TM_IN_FLUX, tm_generation(word)) | TM_WORD_FLAG;
    default:
        return word;
    }
}

uint64_t tm_begin_overwriting(struct tm_device *device, uint64_t page)
{
    tm_look(&device->locks, page);
    uint64_t word = tm_word(device, page);
    tm_touch(device, page, without_file(word));
    tm_unlook(&device->locks, page);
    return word;
}

static uint64_t index_offset(const struct tm_device *device, uint64_t block)
{
    return device->layout.index_offset + block * TM_PAGE;
}

static uint64_t reserve_offset(const struct tm_device *device, uint32_t n)
{
    return device->layout.reserve_offset + (uint64_t)n * TM_PAGE;
}

/* Pages the reserve should have: as many as the index still lacks, up to its full size. */
static uint32_t reserve_wanted(struct tm_device *device)
{
    uint64_t missing = device->layout.blocks - atomic_load(&device->counters->index_bytes) / TM_PAGE;
    return missing < TM_RESERVE_PAGES ? (uint32_t)missing : TM_RESERVE_PAGES;
}

uint32_t tm_reserve_missing(struct tm_device *device)
{
    uint32_t wanted = reserve_wanted(device), reserve = atomic_load(&device->reserve);
    return reserve < wanted ? wanted - reserve : 0;
}

void tm_reserve_fill(struct tm_device *device)
{
    pthread_mutex_lock(&device->index_lock);
    uint32_t reserve = atomic_load(&device->reserve), wanted = reserve_wanted(device);
    while (reserve > wanted)
        tm_give(&device->budget, device->pool_fd, reserve_offset(device, --reserve), TM_PAGE);
    while (reserve < wanted && tm_take(&device->budget, device->pool_fd, reserve_offset(device, reserve), TM_PAGE,
                                       tm_above_target(&device->budget)) == 0)
        reserve++;
    atomic_store(&device->reserve, reserve);
    pthread_mutex_unlock(&device->index_lock);
}

/* Allocate a page of the index; where neither limit nor host allow one more, a page of the reserve makes room. */
static int take_index_page(struct tm_device *device, uint64_t block)
{
    int error = tm_take(&device->budget, device->pool_fd, index_offset(device, block), TM_PAGE, 0);
    uint32_t reserve = atomic_load(&device->reserve);
    if (!error || !reserve)
        return error;
    tm_give(&device->budget, device->pool_fd, reserve_offset(device, reserve - 1), TM_PAGE);
    atomic_store(&device->reserve, reserve - 1);
    return tm_take(&device->budget, device->pool_fd, index_offset(device, block), TM_PAGE, 0);
}

/* Allocate and fill the block's page of the index, then let everyone see it. Under index_lock. */
static int fill_block(struct tm_device *device, uint64_t block)
{
    int error = take_index_page(device, block);
    if (error)
        return error;
    uint8_t state = atomic_load_explicit(&device->blocks[block], memory_order_relaxed);
    uint64_t first = block * TM_BLOCK_PAGES;
    for (uint32_t i = 0; state != TM_STATE_INDEX && i < tm_block_pages(device, block); i++) {
        uint64_t word = state_word(device, state, first + i);
        atomic_store_explicit(&device->index[first + i], word, memory_order_relaxed);
        change_age(device, TM_NOWHERE, word);
    }
    tm_count(&device->counters->index_bytes, TM_PAGE);
    /* Killed before this, the page of the index means nothing yet; after it, it is whole. */
    atomic_store_explicit(&device->states[block], TM_STATE_INDEX, memory_order_release);
    atomic_store_explicit(&device->blocks[block], TM_BLOCK_IN_INDEX, memory_order_release);
    return 0;
}

static int use_block(struct tm_device *device, uint64_t block)
{
    int error = 0;
    for (int attempt = 0;; attempt++) {
        pthread_mutex_lock(&device->index_lock);
        error = tm_in_index(device, block) ? 0 : fill_block(device, block);
        pthread_mutex_unlock(&device->index_lock);
        uint64_t freed;
        if (!error || attempt == ROOM_ATTEMPTS || tm_demote(device, ROOM_BYTES, (struct tm_choice){0}, &freed) != 0)
            return error;
        tm_settle(device, ROOM_MOVES);
    }
}

int tm_lock_in_index(struct tm_device *device, uint64_t first, uint32_t n)
{
    uint64_t one = first / TM_BLOCK_PAGES, other = (first + n - 1) / TM_BLOCK_PAGES;
    for (;;) {
        int error = tm_in_index(device, one) ? 0 : use_block(device, one);
        if (!error && !tm_in_index(device, other))
            error = use_block(device, other);
        if (error)
            return error;
        tm_lock_run(&device->locks, first, n);
        if (tm_in_index(device, one) && tm_in_index(device, other))
            return 0;
        tm_unlock_run(&device->locks, first, n); /* a trim of the whole block came between */
    }
}

static void look_block(struct tm_device *device, uint64_t block)
{
    for (uint32_t i = 0; i < tm_block_pages(device, block); i++)
        tm_look(&device->locks, block * TM_BLOCK_PAGES + i);
}

static void unlook_block(struct tm_device *device, uint64_t block)
{
    for (uint32_t i = 0; i < tm_block_pages(device, block); i++)
        tm_unlook(&device->locks, block * TM_BLOCK_PAGES + i);
}

/* Switch the whole block to `state` in one step, and give its page of the index back. Under its change locks. */
static void empty_block(struct tm_device *device, uint64_t block, uint8_t state)
{
    uint64_t words[TM_BLOCK_PAGES], first = block * TM_BLOCK_PAGES;
    uint32_t n = tm_block_pages(device, block);
    look_block(device, block); /* blocks are aligned to the stripes, so this takes them in order */
    bool had_index = tm_in_index(device, block);
    for (uint32_t i = 0; i < n; i++)
        words[i] = tm_word(device, first + i);
    atomic_store_explicit(&device->states[block], state, memory_order_release);
    atomic_store_explicit(&device->blocks[block], state, memory_order_release);
    if (had_index) {
        tm_give(&device->budget, device->pool_fd, index_offset(device, block), TM_PAGE);
        tm_uncount(&device->counters->index_bytes, TM_PAGE);
    }
    unlook_block(device, block);
    for (uint32_t i = 0; i < n; i++) {
        count_freed(device, words[i]);
        count_change(device, words[i], TM_NOWHERE);
        if (had_index)
            change_age(device, words[i], TM_NOWHERE);
        free_slot(device, words[i]);
    }
}

int tm_zero_block(struct tm_device *device, uint64_t block)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    uint32_t n = tm_block_pages(device, block);
    tm_lock_run(&device->locks, first, n);
    /* fill_block does not hold change locks, so it is kept away by its own. */
    pthread_mutex_lock(&device->index_lock);
    uint8_t state = atomic_load(&device->blocks[block]);
    int error = 0;
    if (state != TM_STATE_INDEX && state != TM_STATE_ZERO) {
        for (uint32_t i = 0; i < n && !error; i++)
            error = tm_map_mark(&device->map, first + i);
        if (!error)
            empty_block(device, block, tm_has_file(device) ? TM_STATE_ZERO : TM_STATE_INDEX);
    }
    pthread_mutex_unlock(&device->index_lock);
    tm_unlock_run(&device->locks, first, n);
    return error;
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

static void adopt_index_pages(struct tm_device *device, uint64_t offset, uint64_t bytes)
{
    tm_count(&device->counters->used, bytes);
    for (uint64_t at = offset; at < offset + bytes; at += TM_PAGE) {
        uint64_t block = (at - device->layout.index_offset) / TM_PAGE;
        static const uint8_t zeros[TM_PAGE];
        bool used = atomic_load(&device->blocks[block]) == TM_STATE_INDEX &&
                    memcmp(device->base + at, zeros, TM_PAGE) != 0;
        if (used) {
            atomic_store(&device->blocks[block], TM_BLOCK_IN_INDEX);
            tm_count(&device->counters->index_bytes, TM_PAGE);
        } else {
            tm_give(&device->budget, device->pool_fd, at, TM_PAGE);
        }
    }
}

static void adopt_data_pages(struct tm_device *device, uint64_t offset, uint64_t bytes)
{
    tm_count(&device->counters->used, bytes);
    tm_slots_backed(&device->slots, offset - device->layout.data_offset, bytes);
}

static bool is_valid(struct tm_device *device, uint64_t word)
{
    if (tm_kind(word) > TM_LOST || ((tm_kind(word) == TM_FILE || tm_kind(word) == TM_LOST) && !tm_has_file(device)))
        return false;
    if (tm_kind(word) != TM_TMEM)
        return true;
    uint32_t length = tm_length(word);
    return length >= 1 && length <= TM_PAGE && tm_encoding(word) <= TM_SAME &&
           tm_location(word) < device->layout.data_bytes &&
           tm_slots_claim(&device->slots, tm_slot_size(length), tm_location(word));
}

/* Count a block's pages and claim their slots; returns the first page whose word cannot be, or UINT64_MAX. */
static uint64_t adopt_block(struct tm_device *device, uint64_t block)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    for (uint64_t page = first; page < first + tm_block_pages(device, block); page++) {
        uint64_t word = tm_word(device, page);
        if (!is_valid(device, word))
            return page;
        count_change(device, TM_NOWHERE, word);
        if (tm_in_index(device, block))
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

int tm_index_attach(struct tm_device *device, char *error, size_t error_size)
{
    const struct tm_layout *layout = &device->layout;
    uint64_t index_end = layout->index_offset + layout->blocks * TM_PAGE;
    uint64_t states_bytes = (layout->blocks + TM_PAGE - 1) / TM_PAGE * TM_PAGE;
    forget_counts(device->counters, TM_STATES_OFFSET + states_bytes);
    for (uint64_t block = 0; block < layout->blocks; block++) {
        uint8_t state = atomic_load(&device->states[block]);
        if (state > TM_STATE_ZERO || (state != TM_STATE_INDEX && !tm_has_file(device))) {
            snprintf(error, error_size, "block %" PRIu64 " is in no known state", block);
            return EINVAL;
        }
        atomic_store(&device->blocks[block], state);
    }
    int failed = tm_punch(device->pool_fd, layout->reserve_offset, TM_RESERVE_PAGES * TM_PAGE);
    if (!failed)
        failed = each_allocated(device, layout->index_offset, index_end, adopt_index_pages);
    if (!failed)
        failed = each_allocated(device, layout->data_offset, layout->data_offset + layout->data_bytes,
                                adopt_data_pages);
    if (failed) {
        snprintf(error, error_size, "cannot find what the pool has allocated: %s", strerror(failed));
        return failed;
    }
    for (uint64_t block = 0; block < layout->blocks; block++) {
        uint8_t state = atomic_load(&device->blocks[block]);
        if (state == TM_STATE_INDEX || state == TM_STATE_ZERO)
            continue;
        uint64_t bad = adopt_block(device, block);
        if (bad != UINT64_MAX) {
            snprintf(error, error_size, "the index contradicts itself at page %" PRIu64, bad);
            return EINVAL;
        }
    }
    tm_slots_finish(&device->slots);
    return 0;
}
