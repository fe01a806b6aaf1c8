/* SPDX-License-Identifier: BSD-3-Clause */
/* The records of a save file, which are the pool's own and some that say where a page is;
 * docs/save-format.md says it in prose. Pure functions. */
#pragma once

#include "codec.h"
#include "tmem.h"

/* Encodings of records that only save files have, after those of the pool. */
enum stream_encoding {
    STREAM_ZERO = 16,       /* zeros, and the file may hold something else */
    STREAM_FILE = 17,       /* in the file, with these checksums: u32 for each page */
    STREAM_UNVERIFIED = 18, /* in the file, with no checksum that is known */
    STREAM_LOST = 19,       /* reads are errors */
    STREAM_END = 32,
};

enum {
    STREAM_RUN_MAX = TM_PAGE / 4,               /* pages that one record may speak of */
    STREAM_MAX = TM_RECORD_HEADER + TM_PAGE + 4 /* bytes of a record, rounded up */
};

/* Whether the encoding is one of the pool's. */
static inline bool stream_is_page(unsigned encoding) { return encoding <= TM_SAME; }

/* The whole record at the start of `size` bytes that speaks of pages from `next` on, of a device of
 * so many: 0 and its length; ENODATA where the end is next; EAGAIN where not all of it is there;
 * EBADMSG where it is none. Sets *page to the first page it speaks of (EBADMSG: as far as is
 * known), and *n to how many these are. */
int stream_check(const uint8_t *bytes, size_t size, uint64_t next, uint64_t pages, size_t *length,
                 uint64_t *page, uint32_t *n);
/* Seal a record whose payload is written; returns its length in bytes. */
size_t stream_seal(struct record *record, uint64_t page, uint16_t encoding, uint32_t length);
