/* SPDX-License-Identifier: BSD-3-Clause */
#include "codec.h"

#include <lz4.h>
#include <string.h>

#include "crc32c.h"

_Static_assert(LZ4_COMPRESSBOUND(TM_PAGE) <= 4128, "LZ4's bound has grown");
_Static_assert(sizeof(struct record) == TM_RECORD_HEADER, "the record header has padding");

/* Above this, compression saves less than the time to undo it is worth; the page is stored raw. */
enum { WORTH_COMPRESSING = TM_PAGE - 64 };

bool codec_is_same(const uint8_t *page, uint64_t *word)
{
    memcpy(word, page, 8);
    return memcmp(page, page + 8, TM_PAGE - 8) == 0;
}

static uint32_t record_crc(uint32_t number, uint16_t length, uint16_t encoding,
                           const uint8_t *payload)
{
    struct {
        uint32_t number;
        uint16_t length, encoding;
    } head = {number, length, encoding};
    return crc32c(crc32c(0, &head, sizeof head), payload, length);
}

static uint32_t encode_payload(uint8_t *payload, const uint8_t *page, bool compress,
                               enum encoding *encoding)
{
    uint64_t word;
    if (codec_is_same(page, &word)) {
        *encoding = TM_SAME;
        memcpy(payload, &word, 8);
        return 8;
    }
    /* LZ4's own choice of state and speed: a state kept between calls, or acceleration 2, gained at
     * most 2 % on pages of live processes and cost 0.5 to 3.4 % in size. */
    int length = compress ? LZ4_compress_default((const char *)page, (char *)payload, TM_PAGE,
                                                 LZ4_COMPRESSBOUND(TM_PAGE))
                          : 0;
    if (length > 0 && length <= WORTH_COMPRESSING) {
        *encoding = TM_LZ4;
        return (uint32_t)length;
    }
    *encoding = TM_RAW;
    memcpy(payload, page, TM_PAGE);
    return TM_PAGE;
}

uint32_t codec_encode(struct encoded *encoded, uint32_t number, const uint8_t *page, bool compress,
                      enum encoding *encoding)
{
    struct record *record = (struct record *)encoded->record;
    uint32_t length = encode_payload(record->payload, page, compress, encoding);
    codec_seal(record, number, length, (uint16_t)*encoding);
    return length;
}

void codec_seal(struct record *record, uint32_t number, uint32_t length, uint16_t encoding)
{
    atomic_store_explicit(&record->page, number, memory_order_relaxed);
    record->length = (uint16_t)length;
    record->encoding = encoding;
    record->crc = record_crc(number, record->length, record->encoding, record->payload);
}

bool codec_is_sealed(const struct record *record)
{
    uint32_t number = atomic_load_explicit(&record->page, memory_order_relaxed);
    return record->crc == record_crc(number, record->length, record->encoding, record->payload);
}

static bool decode_payload(const uint8_t *payload, uint32_t length, enum encoding encoding,
                           uint8_t *page)
{
    switch (encoding) {
    case TM_RAW:
        if (length != TM_PAGE)
            return false;
        memcpy(page, payload, TM_PAGE);
        return true;
    case TM_LZ4:
        return LZ4_decompress_safe((const char *)payload, (char *)page, (int)length, TM_PAGE) ==
               TM_PAGE;
    case TM_SAME:
        if (length != 8)
            return false;
        for (int i = 0; i < TM_PAGE; i += 8)
            memcpy(page + i, payload, 8);
        return true;
    }
    return false;
}

bool codec_is_intact(const struct record *record, uint64_t word, uint32_t number)
{
    return atomic_load_explicit(&record->page, memory_order_relaxed) == number &&
           record->length == word_length(word) && record->encoding == word_encoding(word) &&
           codec_is_sealed(record);
}

bool codec_unpack(const struct record *record, uint8_t *page)
{
    return decode_payload(record->payload, record->length, (enum encoding)record->encoding, page);
}

bool codec_decode(const struct record *record, uint64_t word, uint32_t number, uint8_t *page)
{
    return codec_is_intact(record, word, number) && codec_unpack(record, page);
}
