/* SPDX-License-Identifier: BSD-3-Clause */
/* Records of a save file become pages of a device that was made anew. What tmem refuses goes to the
 * file, neighbours together. */
#include <errno.h>
#include <string.h>

#include "bounce.h"
#include "crc32c.h"
#include "overwrite.h"
#include "stream.h"

/* Neighbours on their way through the page path, for they were refused, or are written through. */
struct refused {
    struct bounce *bounce;
    uint64_t first;
    uint32_t n;
};

static int write_refused(struct tm_device *device, struct refused *refused)
{
    uint64_t offset = refused->first * TM_PAGE, count = (uint64_t)refused->n * TM_PAGE;
    if (count > device->size - offset)
        count = device->size - offset; /* the last page may end early */
    int error =
        count ? tm_write(device, refused->bounce->pages, (uint32_t)count, offset, false) : 0;
    if (!error)
        refused->n = 0;
    return error;
}

static int add_refused(struct tm_device *device, struct refused *refused, uint64_t page,
                       const struct record *record)
{
    bool goes_on = refused->n && page == refused->first + refused->n && refused->n < TM_RUN_MAX;
    int error = refused->n && !goes_on ? write_refused(device, refused) : 0;
    if (error)
        return error;
    if (!refused->n)
        refused->first = page;
    uint8_t *content = refused->bounce->pages + (size_t)refused->n++ * TM_PAGE;
    return codec_unpack(record, content) ? 0 : EBADMSG;
}

static int restore_page(struct tm_device *device, struct refused *refused, uint64_t page,
                        const struct record *record)
{
    if (state_is_written_through(device, page))
        return add_refused(device, refused, page, record);
    int error = overwrite_lock_pages(device, page, 1);
    if (error)
        return error;
    bool stored = page_put_record(device, page, record);
    unlock_pages(&device->locks, page, 1);
    return stored ? 0 : add_refused(device, refused, page, record);
}

/* What a page is whose content is not in the stream. */
static uint64_t word_of(struct tm_device *device, const struct record *record, uint32_t i)
{
    uint32_t crc;
    switch (record->encoding) {
    case STREAM_ZERO:
        return TM_ZERO;
    case STREAM_FILE:
        memcpy(&crc, record->payload + (size_t)i * 4, sizeof crc);
        return word_of_file(crc, state_generation(device));
    case STREAM_UNVERIFIED:
        return TM_FILE | TM_WORD_UNVERIFIED;
    default:
        return TM_LOST;
    }
}

static int restore_places(struct tm_device *device, uint64_t first, uint32_t n,
                          const struct record *record)
{
    if (!state_has_file(device))
        return ENOTSUP;
    int error = 0;
    for (uint32_t i = 0; i < n && !error; i++) {
        error = overwrite_lock_pages(device, first + i, 1);
        if (error)
            break;
        index_set(device, first + i, word_of(device, record, i));
        unlock_pages(&device->locks, first + i, 1);
    }
    return error;
}

static int take(struct tm_device *device, struct refused *refused, uint64_t page, uint32_t n,
                const uint8_t *bytes, size_t length)
{
    struct encoded copy; /* in a stream records are not aligned */
    const struct record *record = (const struct record *)copy.record;
    if (!device)
        return 0;
    memcpy(copy.record, bytes, length);
    return stream_is_page(record->encoding) ? restore_page(device, refused, page, record)
                                            : restore_places(device, page, n, record);
}

static int take_all(struct tm_device *device, struct tm_restoring *restoring, const uint8_t *bytes,
                    size_t size, struct refused *refused, size_t *used)
{
    int error = 0;
    while (!error) {
        size_t length;
        uint64_t page;
        uint32_t n;
        error = stream_check(bytes + *used, size - *used, restoring->page, restoring->device_pages,
                             &length, &page, &n);
        restoring->page = error == EAGAIN ? restoring->page : page;
        if (!error)
            error = take(device, refused, page, n, bytes + *used, length);
        if (error)
            break;
        restoring->page = page + n;
        restoring->records++;
        *used += length;
    }
    restoring->ended = error == ENODATA;
    return error == EAGAIN || error == ENODATA ? 0 : error;
}

int tm_restore(struct tm_device *device, struct tm_restoring *restoring, const void *buffer,
               size_t size, size_t *used)
{
    struct refused refused = {.bounce = bounce_get()};
    *used = 0;
    if (!refused.bounce)
        return ENOMEM;
    int error = take_all(device, restoring, buffer, size, &refused, used);
    if (!error && refused.n)
        error = write_refused(device, &refused);
    if (error && error != EBADMSG && refused.n)
        restoring->page = refused.first;
    bounce_put(refused.bounce);
    restoring->crc = crc32c(restoring->crc, buffer, *used);
    return error;
}
