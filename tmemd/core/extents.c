/* SPDX-License-Identifier: BSD-3-Clause */
/* Block status: what reads as zeros. It looks at the index alone, without a lock. */
#include "index.h"

static bool is_zero(const struct tm_device *device, uint64_t page)
{
    enum kind kind = word_kind(index_word(device, page));
    return (kind == TM_NOWHERE || kind == TM_ZERO) && !state_is_bypassed(device);
}

int tm_extents(struct tm_device *device, uint64_t count, uint64_t offset, struct tm_extent *extents,
               size_t *n)
{
    uint64_t end = offset + count, last = (end + TM_PAGE - 1) / TM_PAGE;
    size_t room = *n;
    for (*n = 0; *n < room && offset < end; ++*n) {
        uint64_t page = offset / TM_PAGE;
        bool zero = is_zero(device, page++);
        while (page < last && is_zero(device, page) == zero)
            page++;
        uint64_t until = page * TM_PAGE < end ? page * TM_PAGE : end;
        extents[*n] = (struct tm_extent){.offset = offset, .length = until - offset, .zero = zero};
        offset = until;
    }
    return 0;
}
