/* SPDX-License-Identifier: BSD-3-Clause */
#include "layout.h"

#include <errno.h>

/* Beside the header and the index: with less than this for records there is no room to work in. */
#define MINIMUM_RECORDS (UINT64_C(512) << 10)

static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

int tm_layout_for(uint64_t size, struct tm_layout *layout)
{
    if (!size || size > TM_MAX_SIZE)
        return EINVAL;
    layout->pages = (size + TM_PAGE - 1) / TM_PAGE;
    layout->blocks = (layout->pages + TM_BLOCK_PAGES - 1) / TM_BLOCK_PAGES;
    layout->index_offset = TM_STATES_OFFSET + round_up(layout->blocks, TM_PAGE);
    uint64_t index_bytes = layout->blocks * TM_PAGE;
    layout->data_offset = round_up(layout->index_offset + index_bytes, TM_SPAN_BYTES);
    /* Every page raw, what spans lose at their ends, and a partly filled span of each class. */
    uint64_t data =
        layout->pages * TM_SLOT_MAX / 16 * 17 + (uint64_t)TM_SIZE_CLASSES * TM_SPAN_BYTES;
    layout->data_bytes = data < TM_MAX_DATA ? round_up(data, TM_SPAN_BYTES) : TM_MAX_DATA;
    layout->minimum = layout->index_offset + index_bytes + MINIMUM_RECORDS;
    return 0;
}
