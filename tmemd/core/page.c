/* SPDX-License-Identifier: BSD-3-Clause */
#include "page.h"

#include <errno.h>
#include <string.h>

#include "codec.h"
#include "compact.h"
#include "probes.h"

static bool decode(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    bool whole = codec_decode(slots_record(&device->slots, word_location(word)), word,
                              (uint32_t)page, content);
    if (!whole)
        stats_add(&device->counters->bad_checksums, 1);
    return whole;
}

/* Note that the page was used, once in a generation: most gets change no word. Who reads a page
 * that an ephemeral pool lacks decides what it was (admit.c); one that LRU would not have had tells
 * that fewer are needed that were used only once. */
static void refresh(struct tm_device *device, uint64_t page, uint64_t word)
{
    unsigned now = state_generation(device);
    bool stored = word_kind(word) == TM_TMEM;
    uint64_t used = word_used(word, now, device->ephemeral && stored);
    if (device->ephemeral && stored && ages_of(now, word) >= USAGE_TURNS)
        usage_learn(&device->usage, false, atomic_load(&device->counters->pages_in_tmem));
    if (used != word && (stored || !device->ephemeral))
        index_update_locked(device, page, used);
}

/* A page that was fetched ahead is used for the first time: it is young from now on. What it says
 * of its age is nothing. Of an ephemeral pool it stays old unless it is admitted (admit.c). */
static void use_first(struct tm_device *device, uint64_t page, uint64_t word)
{
    unsigned generation = device->ephemeral ? word_generation(word) : state_generation(device);
    stats_add(&device->counters->prefetch_hits, 1);
    index_update_locked(device, page, word_with_generation(word & ~TM_WORD_AHEAD, generation));
}

static int get_stored(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    uint64_t start = stats_now();
    if (!decode(device, page, word, content))
        return device->ephemeral ? EAGAIN : EIO;
    stats_add(&device->counters->gets, 1);
    stats_took(&device->statistics->get, start);
    if (word_is_ahead(word)) {
        use_first(device, page, word);
    } else {
        stats_add(&device->statistics->gets_by_age[state_age(device, word)], 1);
        refresh(device, page, word);
    }
    return 0;
}

static int get_locked(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    if (state_is_bypassed(device))
        return EAGAIN;
    switch (word_kind(word)) {
    case TM_TMEM:
        return get_stored(device, page, word, content);
    case TM_FILE:
        refresh(device, page, word);
        return EAGAIN;
    case TM_TORN:
        stats_add(&device->counters->bad_checksums, 1);
        return EIO;
    case TM_LOST:
        if (!device->lost_zero)
            return EIO;
        break;
    default:
        break;
    }
    memset(content, 0, TM_PAGE);
    return 0;
}

int page_get(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    lock_entry(&device->locks, page);
    *word = index_word(device, page);
    int error = get_locked(device, page, *word, content);
    unlock_entry(&device->locks, page);
    PROBE(get, device->name, page, error);
    return error;
}

bool page_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    lock_entry(&device->locks, page);
    *word = index_word(device, page);
    bool whole = word_kind(*word) == TM_TMEM && decode(device, page, *word, content);
    unlock_entry(&device->locks, page);
    return whole;
}

bool page_holds(struct tm_device *device, uint64_t page, const uint8_t *content)
{
    uint8_t now[TM_PAGE];
    uint64_t word;
    if (page_copy_out(device, page, now, &word))
        return memcmp(now, content, TM_PAGE) == 0;
    return (word == TM_NOWHERE || word_kind(word) == TM_ZERO) && page_is_zero(content);
}

bool page_is_zero(const uint8_t *content)
{
    uint64_t first;
    return codec_is_same(content, &first) && !first;
}

/* The word of a page of zeros: 'nowhere' only where the file is known to hold zeros, too. */
static uint64_t zero_word(struct tm_device *device, uint64_t page, bool clean)
{
    return clean || !state_has_file(device) || index_word(device, page) == TM_NOWHERE ? TM_NOWHERE
                                                                                      : TM_ZERO;
}

static void count_encoding(struct tm_counters *counters, enum encoding encoding)
{
    if (encoding == TM_SAME)
        stats_add(&counters->puts_same, 1);
    if (encoding == TM_RAW)
        stats_add(&counters->puts_raw, 1);
}

/* Whether there is no use in trying. In a full pool a new page rarely finds a slot: if it can spill
 * it is not compressed to see. A stored page frees its own slot. */
static bool is_refused(struct tm_device *device, uint64_t page)
{
    bool is_new = word_kind(index_word(device, page)) != TM_TMEM;
    bool is_hopeless = is_new && state_has_file(device) && !device->ephemeral &&
                       budget_is_full(&device->budget) && !compact_is_worth(device);
    return is_hopeless || budget_is_refusing(&device->budget);
}

static uint64_t store_record(struct tm_device *device, const struct record *record)
{
    uint64_t location;
    while (!slots_alloc(&device->slots, word_slot_size(record->length), &location))
        if (!compact_reclaim(device))
            return 0;
    slots_fill(&device->slots, location, record, record->length);
    return word_of_record(location, record->length, (enum encoding)record->encoding,
                          state_generation(device));
}

uint64_t page_store(struct tm_device *device, uint64_t page, const uint8_t *content)
{
    struct encoded encoded;
    enum encoding encoding;
    if (is_refused(device, page))
        return 0;
    codec_encode(&encoded, (uint32_t)page, content, budget_is_compressing(&device->budget),
                 &encoding);
    return store_record(device, (const struct record *)encoded.record);
}

bool page_put_record(struct tm_device *device, uint64_t page, const struct record *record)
{
    uint64_t word = is_refused(device, page) ? 0 : store_record(device, record);
    if (word)
        index_replace(device, page, word);
    return word;
}

static bool put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean)
{
    if (page_is_zero(content)) {
        stats_add(&device->counters->puts_zero, 1);
        index_replace(device, page, zero_word(device, page, clean));
        return true;
    }
    uint64_t word = page_store(device, page, content);
    if (!word)
        return false;
    count_encoding(device->counters, word_encoding(word));
    index_replace(device, page, clean ? word | TM_WORD_CLEAN : word);
    return true;
}

bool page_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean)
{
    uint64_t start = stats_now();
    bool stored = put(device, page, content, clean);
    stats_add(&device->counters->puts, 1);
    if (stored)
        stats_took(&device->statistics->put, start);
    else
        stats_add(&device->counters->puts_refused, 1);
    PROBE(put, device->name, page, stored);
    return stored;
}
