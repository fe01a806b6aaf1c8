/* SPDX-License-Identifier: BSD-3-Clause */
/* A device's pages become records of a save file: pages in tmem as the pool has them, neighbours of
 * which there is no more to say than where they are in one. */
#include <errno.h>
#include <string.h>

#include "crc32c.h"
#include "fetch.h"
#include "stream.h"

/* Where the next record goes. */
struct output {
    uint8_t *at;
    struct encoded encoded;
};

/* What there is to say of a page. */
enum said { NOTHING, RECORD, CONTENT, CHECKSUM, MARK_ZERO, MARK_UNVERIFIED, MARK_LOST };

static enum said said_of(const struct tm_device *device, bool whole, uint64_t word)
{
    switch (word_kind(word)) {
    case TM_NOWHERE:
        return NOTHING;
    case TM_ZERO:
        return whole ? NOTHING : MARK_ZERO;
    case TM_TMEM:
        return !whole && state_is_clean(device, word) ? CHECKSUM : RECORD;
    case TM_FILE:
        if (whole)
            return CONTENT;
        return word & TM_WORD_UNVERIFIED && !word_is_writing(word) ? MARK_UNVERIFIED : CHECKSUM;
    default:
        return MARK_LOST;
    }
}

static void put_record(struct tm_saving *saving, struct output *output, uint64_t page,
                       uint16_t encoding, uint32_t length)
{
    struct record *record = (struct record *)output->encoded.record;
    size_t size = stream_seal(record, page, encoding, length);
    memcpy(output->at, record, size);
    output->at += size;
    saving->records++;
}

static uint8_t *payload_of(struct output *output)
{
    return ((struct record *)output->encoded.record)->payload;
}

static void put_mark(struct tm_saving *saving, struct output *output, uint16_t encoding, uint32_t n)
{
    memcpy(payload_of(output), &n, sizeof n);
    put_record(saving, output, saving->page, encoding, sizeof n);
    saving->page += n;
}

static void put_lost(struct tm_saving *saving, struct output *output, uint32_t n)
{
    saving->lost += n;
    put_mark(saving, output, STREAM_LOST, n);
}

/* A page whose content was to be had, and is not: its reads are errors, here and there. */
static void put_damaged(struct tm_saving *saving, struct output *output)
{
    if (!saving->damaged++)
        saving->first_damaged = saving->page;
    put_lost(saving, output, 1);
}

static void put_page(struct tm_saving *saving, struct output *output, const struct record *record)
{
    size_t size = TM_RECORD_HEADER + (size_t)record->length;
    memcpy(output->at, record, size);
    output->at += size;
    saving->records++;
    saving->pages++;
    saving->page++;
}

static void save_record(struct tm_device *device, struct tm_saving *saving, struct output *output)
{
    uint64_t word = index_word(device, saving->page);
    const struct record *record = slots_record(&device->slots, word_location(word));
    if (codec_is_intact(record, word, (uint32_t)saving->page))
        put_page(saving, output, record);
    else
        put_damaged(saving, output);
}

static void save_content(struct tm_device *device, struct tm_saving *saving, struct output *output,
                         const uint8_t *content)
{
    enum encoding encoding;
    if (page_is_zero(content)) {
        saving->page++;
        return;
    }
    codec_encode(&output->encoded, (uint32_t)saving->page, content,
                 budget_is_compressing(&device->budget), &encoding);
    put_page(saving, output, (const struct record *)output->encoded.record);
}

/* Whether an error is the page's: what was read is not what was written. The disk's would be
 * counted, and may be gone the next time. */
static bool is_damage(const struct tm_device *device, int error, uint64_t io_errors)
{
    return error == EIO && atomic_load(&device->counters->io_errors) == io_errors;
}

/* Neighbours that are in the file; where one of them cannot be read each by itself. */
static int save_run(struct tm_device *device, struct tm_saving *saving, struct output *output,
                    uint32_t n, uint8_t *content)
{
    uint64_t words[TM_RUN_MAX], io_errors = atomic_load(&device->counters->io_errors);
    for (uint32_t i = 0; i < n; i++)
        words[i] = index_word(device, saving->page + i);
    int error = fetch_pages(device, saving->page, pages_all(n), words, content);
    if (is_damage(device, error, io_errors)) {
        if (n > 1)
            return save_run(device, saving, output, 1, content);
        put_damaged(saving, output);
        return 0;
    }
    for (uint32_t i = 0; i < n && !error; i++)
        save_content(device, saving, output, content + (size_t)i * TM_PAGE);
    return error;
}

static int save_contents(struct tm_device *device, struct tm_saving *saving, struct output *output,
                         uint32_t n)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    int error = save_run(device, saving, output, n < TM_RUN_MAX ? n : TM_RUN_MAX, bounce->pages);
    bounce_put(bounce);
    return error;
}

/* The checksum of a page that the file holds: 0, or an errno; EBADMSG: the page is damaged. */
static int checksum_of(struct tm_device *device, uint64_t page, uint32_t *crc)
{
    uint8_t content[TM_PAGE];
    uint64_t word = index_word(device, page), io_errors = atomic_load(&device->counters->io_errors);
    *crc = word_crc(word);
    if (word_kind(word) == TM_FILE && !word_is_writing(word))
        return 0;
    int error = word_kind(word) == TM_TMEM
                    ? (page_copy_out(device, page, content, &word) ? 0 : EBADMSG)
                    : fetch_page(device, page, content, &word);
    *crc = crc32c(0, content, TM_PAGE);
    return is_damage(device, error, io_errors) ? EBADMSG : error;
}

static int save_checksums(struct tm_device *device, struct tm_saving *saving, struct output *output,
                          uint32_t n)
{
    uint32_t done = 0, crc = 0;
    int error = 0;
    for (; done < n; done++) {
        error = checksum_of(device, saving->page + done, &crc);
        if (error)
            break;
        memcpy(payload_of(output) + (size_t)done * 4, &crc, sizeof crc);
    }
    if (done) {
        put_record(saving, output, saving->page, STREAM_FILE, done * 4);
        saving->page += done;
    }
    if (error == EBADMSG)
        put_damaged(saving, output);
    return error == EBADMSG ? 0 : error;
}

/* Neighbours, from the next page on, of which the same is to be said. */
static int save_alike(struct tm_device *device, struct tm_saving *saving, struct output *output)
{
    enum said said = said_of(device, saving->whole, index_word(device, saving->page));
    uint64_t end = saving->page + 1, pages = device->layout.pages;
    while (end < pages && end - saving->page < STREAM_RUN_MAX &&
           said_of(device, saving->whole, index_word(device, end)) == said)
        end++;
    uint32_t n = (uint32_t)(end - saving->page);
    switch (said) {
    case RECORD:
        for (n = n < TM_RUN_MAX ? n : TM_RUN_MAX; n; n--)
            save_record(device, saving, output);
        return 0;
    case CONTENT:
        return save_contents(device, saving, output, n);
    case CHECKSUM:
        return save_checksums(device, saving, output, n);
    case MARK_ZERO:
        put_mark(saving, output, STREAM_ZERO, n);
        return 0;
    case MARK_UNVERIFIED:
        put_mark(saving, output, STREAM_UNVERIFIED, n);
        return 0;
    case MARK_LOST:
        put_lost(saving, output, n);
        return 0;
    default:
        saving->page += n;
        return 0;
    }
}

int tm_save(struct tm_device *device, struct tm_saving *saving, void *buffer, size_t size,
            size_t *used)
{
    struct output output = {.at = buffer};
    const uint8_t *start = buffer, *last = start + size - TM_RUN_MAX * STREAM_MAX;
    int error = 0;
    while (saving->page < device->layout.pages && output.at <= last && !error)
        error = save_alike(device, saving, &output);
    *used = (size_t)(output.at - start);
    saving->crc = crc32c(saving->crc, start, *used);
    return error;
}
