#include "device.h"

/* The word of a page of zeros: 'nowhere' only where the file is known to hold zeros too. */
static uint64_t zero_word(struct tm_device *device, uint64_t page)
{
    return tm_has_file(device) && tm_word(device, page) != TM_NOWHERE ? TM_ZERO : TM_NOWHERE;
}

static void count_encoding(struct tm_device *device, enum tm_encoding encoding)
{
    if (encoding == TM_SAME)
        tm_count(&device->counters->puts_same, 1);
    if (encoding == TM_RAW)
        tm_count(&device->counters->puts_raw, 1);
}

/* Encode the page into a slot of its own; 0: refused. The slot holds the whole record before any word says so. */
static uint64_t store_record(struct tm_device *device, uint64_t page, const uint8_t *content)
{
    struct tm_encoded encoded;
    enum tm_encoding encoding;
    uint64_t location;
    /* Most pages would not find a free slot of their size: where they have another place to go, none is compressed to see. Those
     * that are in tmem have left slots, and leave one themselves. */
    bool is_new = tm_kind(tm_word(device, page)) != TM_TMEM;
    bool unseen = is_new && tm_has_file(device) && tm_is_full(&device->budget) && !tm_is_wasteful(device);
    if (unseen || tm_refusing(&device->budget))
        return 0;
    uint32_t length = tm_encode(&encoded, (uint32_t)page, content, tm_is_compressing(&device->budget), &encoding);
    while (!tm_slot_alloc(&device->slots, tm_slot_size(length), &location))
        if (!tm_reclaim(device))
            return 0;
    tm_copy_record(device, location, (const struct tm_record *)encoded.record, length);
    return tm_tmem_word(location, length, encoding, atomic_load_explicit(&device->generation, memory_order_relaxed));
}

bool tm_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean)
{
    uint64_t first_word, start = tm_now();
    tm_count(&device->counters->puts, 1);
    if (tm_is_same(content, &first_word) && !first_word) {
        tm_count(&device->counters->puts_zero, 1);
        tm_replace(device, page, clean ? TM_NOWHERE : zero_word(device, page));
        tm_took(&device->statistics->put, start);
        return true;
    }
    uint64_t word = store_record(device, page, content);
    if (!word) {
        tm_count(&device->counters->puts_refused, 1);
        return false;
    }
    count_encoding(device, tm_encoding(word));
    tm_replace(device, page, clean ? word | TM_WORD_CLEAN : word);
    tm_took(&device->statistics->put, start);
    return true;
}

/* Put what the file holds as well, under the page's change lock: its content does not change. */
static bool put_again(struct tm_device *device, uint64_t page, const uint8_t *content)
{
    uint64_t first_word, word = TM_NOWHERE;
    if (!tm_is_same(content, &first_word) || first_word) {
        word = store_record(device, page, content);
        if (!word)
            return false;
        word |= TM_WORD_CLEAN;
    }
    tm_publish(device, page, word);
    tm_count(&device->counters->promotions, 1);
    return true;
}

bool tm_promote(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word)
{
    if (word & TM_WORD_WRITING || !tm_try_lock(&device->locks, page))
        return false;
    bool stored = tm_same_content(tm_word(device, page), word) && put_again(device, page, content);
    tm_unlock_run(&device->locks, page, 1);
    return stored;
}
