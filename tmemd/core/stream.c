/* SPDX-License-Identifier: BSD-3-Clause */
#include "stream.h"

#include <errno.h>
#include <string.h>

/* Of how many pages a record speaks; 0: its length is not one that its encoding can have. */
static uint32_t count_of(const struct record *record)
{
    uint32_t length = record->length, n;
    switch (record->encoding) {
    case TM_RAW:
        return length == TM_PAGE;
    case TM_LZ4:
        return length >= 1 && length < TM_PAGE;
    case TM_SAME:
        return length == 8;
    case STREAM_FILE:
        return length <= TM_PAGE && length % 4 == 0 ? length / 4 : 0;
    case STREAM_ZERO:
    case STREAM_UNVERIFIED:
    case STREAM_LOST:
        memcpy(&n, record->payload, sizeof n);
        return length == sizeof n ? n : 0;
    default:
        return 0;
    }
}

int stream_check(const uint8_t *bytes, size_t size, uint64_t next, uint64_t pages, size_t *length,
                 uint64_t *page, uint32_t *n)
{
    struct encoded copy; /* records lie anywhere in a stream; a copied head is read as one */
    struct record *record = (struct record *)copy.record;
    *page = next;
    if (size < TM_RECORD_HEADER)
        return EAGAIN;
    memcpy(record, bytes, TM_RECORD_HEADER);
    uint64_t first = atomic_load_explicit(&record->page, memory_order_relaxed);
    if (record->encoding == STREAM_END)
        return ENODATA;
    if (first >= next && first < pages)
        *page = first;
    if (record->length > TM_PAGE)
        return EBADMSG;
    *length = TM_RECORD_HEADER + record->length;
    if (size < *length)
        return EAGAIN;
    memcpy(record->payload, bytes + TM_RECORD_HEADER, record->length);
    *n = count_of(record);
    bool possible = first == *page && *n && *n <= pages - first;
    return possible && codec_is_sealed(record) ? 0 : EBADMSG;
}

size_t stream_seal(struct record *record, uint64_t page, uint16_t encoding, uint32_t length)
{
    codec_seal(record, (uint32_t)page, length, encoding);
    return TM_RECORD_HEADER + length;
}
