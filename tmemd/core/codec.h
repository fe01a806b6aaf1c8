/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages to records and back. Pure functions. */
#pragma once

#include <stdatomic.h>

#include "word.h"

struct record {
    _Atomic uint32_t page; /* atomic: the compactor looks at slots that are being written */
    uint32_t crc;
    uint16_t length;
    uint16_t encoding;
    uint8_t payload[];
};

/* Room to encode one page in. */
struct encoded {
    _Alignas(8)
        uint8_t record[TM_RECORD_HEADER + 4128]; /* LZ4_COMPRESSBOUND(4096), checked in codec.c */
};

/* Whether the page repeats one 8-byte word; *word is that word. */
bool codec_is_same(const uint8_t *page, uint64_t *word);

/* Encode page `number` as a whole record; returns the payload's length and sets *encoding. */
uint32_t codec_encode(struct encoded *encoded, uint32_t number, const uint8_t *page, bool compress,
                      enum encoding *encoding);

/* Write the head of a record whose payload is there. */
void codec_seal(struct record *record, uint32_t number, uint32_t length, uint16_t encoding);
/* Whether its checksum is right; its length was checked. */
bool codec_is_sealed(const struct record *record);
/* Whether a record is whole, and what the index word says. */
bool codec_is_intact(const struct record *record, uint64_t word, uint32_t number);
/* Decode a sealed record into 4096 bytes; false when that is not what its payload gives. */
bool codec_unpack(const struct record *record, uint8_t *page);
/* Decode a record into 4096 bytes; false when it is not what the index word says. */
bool codec_decode(const struct record *record, uint64_t word, uint32_t number, uint8_t *page);
