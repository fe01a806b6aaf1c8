/* SPDX-License-Identifier: BSD-3-Clause */
/* The word that the index has of each page; docs/pool-format.md shows its bits. No locks. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* What a page is; docs/architecture.md has the states in full. */
enum kind {
    TM_NOWHERE = 0, /* zeros, here and in the file */
    TM_TMEM = 1,    /* in a slot */
    TM_FILE = 2,    /* in the file alone */
    TM_ZERO = 3,    /* zeros, and anything in the file */
    TM_LOST = 4,    /* gone with the host */
    TM_TORN = 5,    /* a write to the file failed, and left neither old nor new there */
};

enum encoding { TM_RAW = 0, TM_LZ4 = 1, TM_SAME = 2 };

#define TM_WORD_KIND UINT64_C(7)
#define TM_WORD_ENCODING (UINT64_C(3) << 3)
#define TM_WORD_GENERATION (UINT64_C(15) << 8)
#define TM_WORD_LENGTH (UINT64_C(0x1fff) << 12)
#define TM_WORD_AGAIN                                                                              \
    (UINT64_C(1) << 25) /* of an ephemeral pool: used more than once, while it was known */
#define TM_WORD_AHEAD (UINT64_C(1) << 26) /* tmem: fetched ahead, clean, and not used since */
#define TM_WORD_CLEAN (UINT64_C(1) << 5)  /* tmem: the file holds the same */
#define TM_WORD_WRITING                                                                            \
    (UINT64_C(1) << 6) /* a write to the file is under way; whoever changes the page clears it */
#define TM_WORD_UNVERIFIED                                                                         \
    (UINT64_C(1) << 7) /* file: no checksum of what was there before is known */
#define TM_OLD_CRC                                                                                 \
    UINT32_C(0xfffff) /* as much of the old checksum as a file word keeps while it is WRITING */

static inline enum kind word_kind(uint64_t word) { return (enum kind)(word & TM_WORD_KIND); }
static inline enum encoding word_encoding(uint64_t word)
{
    return (enum encoding)((word & TM_WORD_ENCODING) >> 3);
}
static inline unsigned word_generation(uint64_t word)
{
    return (unsigned)((word & TM_WORD_GENERATION) >> 8);
}
static inline uint32_t word_length(uint64_t word)
{
    return (uint32_t)((word & TM_WORD_LENGTH) >> 12);
}
static inline uint64_t word_location(uint64_t word) { return (word >> 28) * TM_SLOT_ALIGN; }
static inline uint32_t word_crc(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t word_old_crc(uint64_t word) { return (uint32_t)(word >> 12) & TM_OLD_CRC; }

/* Whether the old checksum is known beside that of what is being written: it lies where AGAIN would
 * be. */
static inline bool word_has_old_crc(uint64_t word)
{
    uint64_t marks = TM_WORD_KIND | TM_WORD_WRITING | TM_WORD_UNVERIFIED;
    return (word & marks) == (TM_FILE | TM_WORD_WRITING);
}

/* The word of a page that is used now, once more or for the first time. */
static inline uint64_t word_used(uint64_t word, unsigned generation, bool again)
{
    uint64_t use = (uint64_t)generation << 8 | (again ? TM_WORD_AGAIN : 0);
    if (word_has_old_crc(word))
        return (word & ~TM_WORD_GENERATION) | (use & TM_WORD_GENERATION);
    return (word & ~(TM_WORD_GENERATION | TM_WORD_AGAIN)) | use;
}

/* A page in tmem: its record's offset in the data area, and the length of its payload, in bytes. */
static inline uint64_t word_of_record(uint64_t location, uint32_t length, enum encoding encoding,
                                      unsigned generation)
{
    return location / TM_SLOT_ALIGN << 28 | (uint64_t)length << 12 | (uint64_t)generation << 8 |
           (uint64_t)encoding << 3 | TM_TMEM;
}

/* A page in the file, with the CRC32C of its content. */
static inline uint64_t word_of_file(uint32_t crc, unsigned generation)
{
    return (uint64_t)crc << 32 | (uint64_t)generation << 8 | TM_FILE;
}

static inline uint64_t word_with_generation(uint64_t word, unsigned generation)
{
    return (word & ~TM_WORD_GENERATION) | (uint64_t)generation << 8;
}

static inline uint64_t word_with_location(uint64_t word, uint64_t location)
{
    return (word & ((UINT64_C(1) << 28) - 1)) | location / TM_SLOT_ALIGN << 28;
}

/* Mark a page that is about to be written to the file with content of this checksum: clears CLEAN.
 * A file page keeps old and new checksum, so that a killed write can be resolved; without an old
 * one any content is accepted. */
static inline uint64_t word_writing(uint64_t word, uint32_t crc)
{
    if (word_kind(word) != TM_FILE)
        return ((word_kind(word) == TM_NOWHERE ? TM_ZERO : word) & ~TM_WORD_CLEAN) |
               TM_WORD_WRITING;
    bool known = !(word & (TM_WORD_WRITING | TM_WORD_UNVERIFIED));
    uint64_t old = known ? (uint64_t)(word_crc(word) & TM_OLD_CRC) << 12 : TM_WORD_UNVERIFIED;
    if (word & TM_WORD_UNVERIFIED)
        old |= word & TM_WORD_AGAIN;
    return (uint64_t)crc << 32 | old | (word & TM_WORD_GENERATION) | TM_WORD_WRITING | TM_FILE;
}

/* The word of a page that the file has now, too: it was written, and nobody has changed it. */
static inline uint64_t word_written(uint64_t word)
{
    return word_kind(word) == TM_ZERO ? TM_NOWHERE : (word & ~TM_WORD_WRITING) | TM_WORD_CLEAN;
}

static inline bool word_is_writing(uint64_t word) { return word & TM_WORD_WRITING; }

static inline bool word_is_ahead(uint64_t word)
{
    return (word & (TM_WORD_KIND | TM_WORD_AHEAD)) == (TM_TMEM | TM_WORD_AHEAD);
}

/* Whether a write to the file was killed: the page is what it was, or what it was to be. */
static inline bool word_is_in_doubt(uint64_t word)
{
    return word_kind(word) == TM_FILE && word_is_writing(word);
}

/* Whether a page that was read from the file has one of the checksums that its word says. */
static inline bool word_matches(uint64_t word, uint32_t crc)
{
    bool has_new = word_is_writing(word) || !(word & TM_WORD_UNVERIFIED);
    return (has_new && word_crc(word) == crc) ||
           (word_has_old_crc(word) && word_old_crc(word) == (crc & TM_OLD_CRC));
}

/* Whether two words of a page differ at most in when it was used. */
static inline bool word_same_content(uint64_t one, uint64_t other)
{
    return word_used(one, 0, false) == word_used(other, 0, false);
}

/* Whether two words count the same by age, wherever the page lies. */
static inline bool word_same_age(uint64_t one, uint64_t other)
{
    uint64_t counted = TM_WORD_KIND | TM_WORD_ENCODING | TM_WORD_CLEAN | TM_WORD_GENERATION |
                       TM_WORD_LENGTH | TM_WORD_AGAIN;
    return ((one ^ other) & counted) == 0;
}

/* Bytes of the slot that holds a record of this payload length. */
static inline uint32_t word_slot_size(uint32_t length)
{
    uint32_t size =
        (TM_RECORD_HEADER + length + TM_SLOT_ALIGN - 1) & ~(uint32_t)(TM_SLOT_ALIGN - 1);
    return size < TM_SLOT_MIN ? TM_SLOT_MIN : size;
}
