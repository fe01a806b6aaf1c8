/* SPDX-License-Identifier: BSD-3-Clause */
/* A record says what it is, and nothing that it says is believed unless it can be. Exit status 0
 * and 'ok'. */
#define _GNU_SOURCE
#include <string.h>

#include "codec.h"
#include "crc32c.h"
#include "fixture.h"

enum { PAGE = 7 };

static _Alignas(8) uint8_t room[TM_SLOT_MAX];
static struct record *record = (struct record *)room;

/* Seal it as docs/pool-format.md says. */
static void seal(void)
{
    uint8_t head[8];
    memcpy(head, room, 4);
    memcpy(head + 4, &record->length, 2);
    memcpy(head + 6, &record->encoding, 2);
    record->crc = crc32c(crc32c(0, head, sizeof head), record->payload, record->length);
}

/* Whether a record of this encoding and length is a page, whatever it holds. */
static bool is_page(enum encoding encoding, uint16_t length)
{
    uint8_t content[TM_PAGE];
    record->page = PAGE;
    record->encoding = (uint16_t)encoding;
    record->length = length;
    seal();
    return codec_decode(record, word_of_record(0, length, encoding, 1), PAGE, content);
}

int main(void)
{
    CHECK(is_page(TM_SAME, 8) && !is_page(TM_SAME, 7) && !is_page(TM_SAME, 16));
    CHECK(is_page(TM_RAW, TM_PAGE) && !is_page(TM_RAW, 8) && !is_page(TM_RAW, TM_PAGE - 1));
    CHECK(!is_page(TM_LZ4, 8) && !is_page((enum encoding)3, 8));
    puts("ok");
    return 0;
}
