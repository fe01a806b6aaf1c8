#include <errno.h>
#include <string.h>

#include "device.h"

/* Pages of a run that were refused and wait to be written to the file together. */
struct spill {
    struct tm_device *device;
    struct tm_bounce *bounce; /* NULL until the first refusal */
    uint64_t first;
    uint32_t n;
    uint64_t before[TM_RUN_MAX]; /* the pages' words before anything of the file was overwritten */
};

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
    uint32_t length = tm_encode(&encoded, (uint32_t)page, content, tm_is_compressing(&device->budget), &encoding);
    if (!tm_slot_alloc(&device->slots, tm_slot_size(length), &location))
        return 0;
    tm_copy_record(device, location, (const struct tm_record *)encoded.record, length);
    return tm_tmem_word(location, length, encoding, atomic_load_explicit(&device->generation, memory_order_relaxed));
}

bool tm_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool filed)
{
    uint64_t first_word, word, start = tm_now();
    tm_count(&device->counters->puts, 1);
    if (tm_is_same(content, &first_word) && !first_word) {
        tm_count(&device->counters->puts_zero, 1);
        tm_replace(device, page, zero_word(device, page));
        tm_took(&device->statistics->put, start);
        return true;
    }
    word = tm_refusing(&device->budget) ? 0 : store_record(device, page, content);
    if (!word) {
        tm_count(&device->counters->puts_refused, 1);
        return false;
    }
    count_encoding(device, tm_encoding(word));
    tm_replace(device, page, filed ? word | TM_WORD_FLAG : word);
    tm_took(&device->statistics->put, start);
    return true;
}

/* It failed: only the checksum from before can tell whether a page in the file is still what it was. */
static void give_up_overwriting(struct spill *spill)
{
    struct tm_device *device = spill->device;
    for (uint32_t i = 0; i < spill->n; i++) {
        if (tm_kind(spill->before[i]) != TM_FILE)
            continue;
        tm_look(&device->locks, spill->first + i);
        unsigned generation = tm_generation(tm_word(device, spill->first + i));
        tm_touch(device, spill->first + i, tm_with_generation(spill->before[i], generation));
        tm_unlook(&device->locks, spill->first + i);
    }
}

/* Write the waiting pages to the file. While it is being overwritten the index vouches for nothing there: killed in between,
 * a page in the file is old or new. On failure a page that was in tmem stays as it was, one in the file is old, new, or
 * fails its checksum. */
static int spill_write(struct spill *spill)
{
    struct tm_device *device = spill->device;
    for (uint32_t i = 0; i < spill->n; i++)
        spill->before[i] = tm_begin_overwriting(device, spill->first + i);
    int error = tm_file_write(&device->file, spill->first, spill->n, spill->bounce->pages);
    if (!error)
        return 0;
    tm_count(&device->counters->io_errors, 1);
    give_up_overwriting(spill);
    spill->n = 0;
    return error;
}

/* Let the index say that the waiting pages, written by now, are in the file. */
static void spill_publish(struct spill *spill)
{
    struct tm_device *device = spill->device;
    unsigned generation = atomic_load_explicit(&device->generation, memory_order_relaxed);
    for (uint32_t i = 0; i < spill->n; i++) {
        uint32_t crc = tm_crc32c(0, spill->bounce->pages + (size_t)i * TM_PAGE, TM_PAGE);
        tm_replace(device, spill->first + i, tm_file_word(crc, generation));
    }
    tm_count(&device->counters->spills, spill->n);
    spill->n = 0;
}

static int spill_flush(struct spill *spill)
{
    if (!spill->n)
        return 0;
    uint64_t start = tm_now();
    int error = spill_write(spill);
    if (error)
        return error;
    spill_publish(spill);
    tm_took(&spill->device->statistics->spill, start);
    return 0;
}

static int spill_page(struct spill *spill, uint64_t page, const uint8_t *content)
{
    if (!tm_has_file(spill->device))
        return EIO;
    if (!spill->bounce && !(spill->bounce = tm_bounce_get(&spill->device->file)))
        return ENOMEM;
    int error = spill->n && spill->first + spill->n != page ? spill_flush(spill) : 0;
    if (error)
        return error;
    if (!spill->n)
        spill->first = page;
    memcpy(spill->bounce->pages + (size_t)spill->n++ * TM_PAGE, content, TM_PAGE);
    return 0;
}

/* Write the page to the file, durably, and put it besides. */
static int write_through(struct spill *spill, uint64_t page, const uint8_t *content)
{
    struct tm_device *device = spill->device;
    int error = spill_flush(spill);
    if (!error)
        error = spill_page(spill, page, content);
    if (!error)
        error = spill_write(spill);
    if (!error)
        error = tm_file_sync(&device->file);
    if (error)
        return error;
    if (tm_put(device, page, content, true))
        spill->n = 0;
    else
        spill_publish(spill);
    return 0;
}

static int write_page(struct spill *spill, uint64_t page, const uint8_t *content)
{
    struct tm_device *device = spill->device;
    int error = tm_map_mark(&device->map, page);
    if (error)
        return error;
    if (tm_is_written_through(device, page))
        return write_through(spill, page, content);
    return tm_put(device, page, content, false) ? 0 : spill_page(spill, page, content);
}

/* What the page will be: the caller's bytes, around them what it holds now. That is zeros where it is lost, and behind the
 * end of the device, so a last page that is written up to there need not be readable. */
static int merge_page(struct tm_device *device, uint64_t page, const uint8_t *bytes, uint32_t from, uint32_t count,
                      uint8_t *content)
{
    bool lost = tm_kind(tm_peek(device, page)) == TM_LOST;
    bool blank = lost || (!from && page * TM_PAGE + count == device->size);
    int error = blank ? 0 : tm_read_locked(device, page, content);
    if (blank)
        memset(content, 0, TM_PAGE);
    memcpy(content + from, bytes, count);
    return error;
}

static int write_part(struct spill *spill, uint64_t page, const uint8_t *bytes, uint32_t from, uint32_t count)
{
    uint8_t content[TM_PAGE];
    int error = merge_page(spill->device, page, bytes, from, count, content);
    return error ? error : write_page(spill, page, content);
}

/* Write bytes that touch at most TM_RUN_MAX pages, all under their change locks. */
static int write_run(struct tm_device *device, const uint8_t *bytes, uint32_t count, uint64_t offset)
{
    uint64_t first = offset / TM_PAGE;
    uint32_t n = (uint32_t)((offset + count - 1) / TM_PAGE - first + 1);
    struct spill spill = {.device = device};
    int error = tm_lock_in_index(device, first, n);
    if (error)
        return error;
    while (count && !error) {
        uint32_t from = (uint32_t)(offset % TM_PAGE), length = TM_PAGE - from;
        length = length < count ? length : count;
        error = length == TM_PAGE ? write_page(&spill, offset / TM_PAGE, bytes)
                                  : write_part(&spill, offset / TM_PAGE, bytes, from, length);
        bytes += length;
        offset += length;
        count -= length;
    }
    int failed = spill_flush(&spill);
    tm_unlock_run(&device->locks, first, n);
    if (spill.bounce)
        tm_bounce_put(&device->file, spill.bounce);
    return error ? error : failed;
}

/* Bytes from offset to the end of the run of pages that is written in one go. */
static uint32_t run_length(uint64_t offset, uint32_t count)
{
    uint32_t room = TM_RUN_MAX * TM_PAGE - (uint32_t)(offset % TM_PAGE);
    return room < count ? room : count;
}

int tm_write(struct tm_device *device, const void *buffer, uint32_t count, uint64_t offset, bool fua)
{
    const uint8_t *bytes = buffer;
    int error = 0;
    tm_count(&device->counters->writes, 1);
    while (count && !error) {
        uint32_t length = run_length(offset, count);
        error = write_run(device, bytes, length, offset);
        bytes += length;
        offset += length;
        count -= length;
    }
    if (!error && fua)
        error = tm_flush(device);
    return error ? EIO : 0;
}

/* Put what the file holds as well, under the page's change lock: its content does not change. */
static bool put_again(struct tm_device *device, uint64_t page, const uint8_t *content)
{
    uint64_t first_word, word = TM_NOWHERE;
    if (!tm_is_same(content, &first_word) || first_word) {
        word = tm_refusing(&device->budget) ? 0 : store_record(device, page, content);
        if (!word)
            return false;
        word |= TM_WORD_FLAG;
    }
    tm_publish(device, page, word);
    tm_count(&device->counters->promotions, 1);
    return true;
}

void tm_promote(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word)
{
    if (!tm_has_room(&device->budget) || !tm_try_lock(&device->locks, page))
        return;
    if (tm_in_index(device, page / TM_BLOCK_PAGES) && tm_same_content(tm_peek(device, page), word))
        put_again(device, page, content);
    tm_unlock_run(&device->locks, page, 1);
}

int tm_cache(struct tm_device *device, uint64_t count, uint64_t offset)
{
    uint8_t content[TM_PAGE];
    uint64_t last = (offset + count + TM_PAGE - 1) / TM_PAGE;
    for (uint64_t page = offset / TM_PAGE; page < last && !tm_refusing(&device->budget); page++) {
        tm_lock_run(&device->locks, page, 1);
        bool stop = tm_in_index(device, page / TM_BLOCK_PAGES) && tm_kind(tm_peek(device, page)) == TM_FILE &&
                    (tm_read_locked(device, page, content) != 0 || !put_again(device, page, content));
        tm_unlock_run(&device->locks, page, 1);
        if (stop)
            break; /* a hint: what cannot be brought in stays where it is */
    }
    return 0;
}
