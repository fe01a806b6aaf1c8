/* SPDX-License-Identifier: BSD-3-Clause */
/* Zero and trim requests: what is written through is zeroed in the file first. */
#include <errno.h>

#include "clean.h"
#include "dead.h"
#include "overwrite.h"

/* Whether the page is not zeros yet, here or (if it is written through) in the file. */
static bool needs_zeroing(const struct tm_device *device, uint64_t page)
{
    uint64_t word = index_word(device, page);
    return state_is_written_through(device, page)
               ? word != TM_NOWHERE || file_is_doubtful(&device->file)
               : word != TM_NOWHERE && word_kind(word) != TM_ZERO;
}

static void make_zeros(struct tm_device *device, uint64_t page)
{
    dead_note(device, page, index_word(device, page));
    index_replace(device, page, state_has_file(device) ? TM_ZERO : TM_NOWHERE);
}

/* Pages that are not written through become zeros; EAGAIN: now they are. */
static int zero_in_index(struct tm_device *device, uint64_t first, uint32_t n)
{
    int error = overwrite_lock_pages(device, first, n);
    if (error)
        return error;
    if (state_is_written_through(device, first)) {
        unlock_pages(&device->locks, first, n);
        return EAGAIN;
    }
    for (uint64_t page = first; page < first + n; page++)
        if (needs_zeroing(device, page))
            make_zeros(device, page);
    unlock_pages(&device->locks, first, n);
    return 0;
}

static int zero_pages(struct tm_device *device, uint64_t page, uint64_t end, bool punch)
{
    int error = 0;
    while (page < end && !error) {
        struct overwrite run = {.first = page, .n = 1, .punch = punch, .is_wanted = needs_zeroing};
        if (needs_zeroing(device, page)) {
            run.n = state_alike_run(device, page, end - page);
            error = state_is_written_through(device, page) ? EAGAIN
                                                           : zero_in_index(device, page, run.n);
            if (error == EAGAIN)
                error = overwrite_run(device, &run);
        }
        page += run.n;
    }
    return error;
}

/* Write zeros over less than a page; the page may be the device's last, which ends early. */
static int zero_part(struct tm_device *device, uint64_t offset, uint64_t count)
{
    static const uint8_t zeros[TM_PAGE];
    return count ? tm_write(device, zeros, (uint32_t)count, offset, false) : 0;
}

/* Blocks of a local backing file stay reserved. */
static bool may_punch(const struct tm_device *device)
{
    return device->ephemeral || (state_has_file(device) && device->file.store->trims);
}

/* [offset, end), with or without the partly covered pages at either end. */
static int zero_range(struct tm_device *device, uint64_t offset, uint64_t end, bool edges)
{
    uint64_t first = (offset + TM_PAGE - 1) / TM_PAGE,
             last = end == device->size ? device->layout.pages : end / TM_PAGE;
    if (last < first) /* inside one page */
        return edges ? zero_part(device, offset, end - offset) : 0;
    int error = edges ? zero_part(device, offset, first * TM_PAGE - offset) : 0;
    if (!error)
        error = zero_pages(device, first, last, !edges && may_punch(device));
    if (!error && edges && end > last * TM_PAGE)
        error = zero_part(device, last * TM_PAGE, end - last * TM_PAGE);
    return error;
}

static int zero_and_flush(struct tm_device *device, uint64_t count, uint64_t offset, bool fua,
                          bool edges)
{
    if (!fence_enter(&device->fence))
        return EIO;
    int error = count ? zero_range(device, offset, offset + count, edges) : 0;
    if (!error && fua)
        error = tm_flush(device);
    fence_leave(&device->fence);
    return error;
}

int tm_zero(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    stats_add(&device->counters->writes, 1);
    return zero_and_flush(device, count, offset, fua, true);
}

int tm_trim(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    stats_add(&device->counters->trims, 1);
    return zero_and_flush(device, count, offset, fua, false);
}
