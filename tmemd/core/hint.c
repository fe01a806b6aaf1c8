/* SPDX-License-Identifier: BSD-3-Clause */
/* What a request is likely to cost. No lock: whoever asks must be right with either answer. */
#define _GNU_SOURCE
#include "index.h"

enum { LONG = 1 << 20 }; /* bytes; forgetting so many pages takes as long as a read from a disk */

static bool is_any_in_file(const struct tm_device *device, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++)
        if (word_kind(index_word(device, page)) == TM_FILE)
            return true;
    return false;
}

static bool is_any_written_through(const struct tm_device *device, uint64_t first, uint64_t last)
{
    for (uint64_t page = first; page <= last; page++)
        if (state_is_written_through(device, page))
            return true;
    return false;
}

/* Whether a bit must be set, durably, before these pages may change. */
static bool is_bit_missing(struct tm_device *device, uint64_t first, uint64_t last)
{
    if (!device->bitmap.regions)
        return false;
    for (uint64_t region = first / device->bitmap.region_pages;
         region <= last / device->bitmap.region_pages; region++)
        if (!bitmap_region_is_set(&device->bitmap, region))
            return true;
    return false;
}

bool tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset)
{
    if (!state_has_file(device))
        return false;
    if (op == TM_FLUSH)
        return state_is_durable(device) || atomic_load(&device->stale);
    if (op != TM_READ && (state_mode(device) != STATE_WRITE_BACK || count > LONG))
        return true;
    uint64_t first = offset / TM_PAGE, last = (offset + count - 1) / TM_PAGE;
    bool is_partial = offset % TM_PAGE || count % TM_PAGE;
    if (op == TM_READ)
        return is_any_in_file(device, first, last);
    return is_bit_missing(device, first, last) || is_any_written_through(device, first, last) ||
           (is_partial && is_any_in_file(device, first, last)) ||
           (op == TM_WRITE &&
            (budget_is_refusing(&device->budget) || budget_is_full(&device->budget)));
}
