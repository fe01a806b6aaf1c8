#include <errno.h>

#include "device.h"

/* One page becomes zeros, under its change lock. *sync: only in the file so far, which is yet to be synced. */
static int zero_page(struct tm_device *device, uint64_t page, bool *sync)
{
    uint64_t word = tm_word(device, page);
    bool through = tm_is_written_through(device, page);
    if (word == TM_NOWHERE || (word == TM_ZERO && !through))
        return 0;
    int error = tm_map_mark(&device->map, page);
    if (error)
        return error;
    if (!through) {
        tm_replace(device, page, tm_has_file(device) ? TM_ZERO : TM_NOWHERE);
        return 0;
    }
    tm_begin_overwriting(device, page);
    *sync = true;
    return tm_file_zero(&device->file, page, 1);
}

/* Whole pages of one run become zeros. Those that are written through are 'nowhere' only once the file's zeros are
 * durable: what is nowhere is not zeroed again. */
static int zero_run(struct tm_device *device, uint64_t first, uint32_t n)
{
    bool sync = false;
    int error = tm_lock_in_index(device, first, n);
    if (error)
        return error;
    for (uint64_t page = first; page < first + n && !error; page++)
        error = zero_page(device, page, &sync);
    if (sync && !error)
        error = tm_file_sync(&device->file);
    for (uint64_t page = first; sync && page < first + n && !error; page++)
        if (tm_is_written_through(device, page))
            tm_replace(device, page, TM_NOWHERE);
    tm_unlock_run(&device->locks, first, n);
    return error;
}

static bool is_zero_block(struct tm_device *device, uint64_t block)
{
    uint8_t state = atomic_load_explicit(&device->blocks[block], memory_order_acquire);
    return state == TM_STATE_INDEX || state == TM_STATE_ZERO;
}

/* Zero from `page` on, within one block and no further than `end`; *next is where it got. */
static int zero_some(struct tm_device *device, uint64_t page, uint64_t end, uint64_t *next)
{
    uint64_t block = page / TM_BLOCK_PAGES, block_end = (block + 1) * TM_BLOCK_PAGES;
    *next = block_end < end ? block_end : end;
    if (is_zero_block(device, block))
        return 0;
    bool whole = page % TM_BLOCK_PAGES == 0 && *next - page == tm_block_pages(device, block);
    if (whole && !tm_has_written_through(device, block))
        return tm_zero_block(device, block);
    if (*next - page > TM_RUN_MAX)
        *next = page + TM_RUN_MAX;
    return zero_run(device, page, (uint32_t)(*next - page));
}

static int zero_pages(struct tm_device *device, uint64_t page, uint64_t end)
{
    int error = 0;
    while (page < end && !error)
        error = zero_some(device, page, end, &page);
    return error;
}

/* Write zeros over less than a page; the page may be the device's last, which ends early. */
static int zero_part(struct tm_device *device, uint64_t offset, uint64_t count)
{
    static const uint8_t zeros[TM_PAGE];
    return count ? tm_write(device, zeros, (uint32_t)count, offset, false) : 0;
}

/* [offset, end), with or without the partly covered pages at either end. */
static int zero_range(struct tm_device *device, uint64_t offset, uint64_t end, bool edges)
{
    uint64_t first = (offset + TM_PAGE - 1) / TM_PAGE, last = end == device->size ? device->layout.pages : end / TM_PAGE;
    if (last < first) /* inside one page */
        return edges ? zero_part(device, offset, end - offset) : 0;
    int error = edges ? zero_part(device, offset, first * TM_PAGE - offset) : 0;
    if (!error)
        error = zero_pages(device, first, last);
    if (!error && edges && end > last * TM_PAGE)
        error = zero_part(device, last * TM_PAGE, end - last * TM_PAGE);
    return error;
}

static int zero_and_flush(struct tm_device *device, uint64_t count, uint64_t offset, bool fua, bool edges)
{
    int error = count ? zero_range(device, offset, offset + count, edges) : 0;
    if (!error && fua)
        error = tm_flush(device);
    return error ? EIO : 0;
}

int tm_zero(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    return zero_and_flush(device, count, offset, fua, true);
}

int tm_trim(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    tm_count(&device->counters->trims, 1);
    return zero_and_flush(device, count, offset, fua, false);
}

static bool reads_as_zeros(struct tm_device *device, uint64_t page)
{
    enum tm_kind kind = tm_kind(tm_peek(device, page));
    return kind == TM_NOWHERE || kind == TM_ZERO;
}

/* The end of the pages from `page` on that are alike, looking no further than `end`. */
static uint64_t alike_until(struct tm_device *device, uint64_t page, uint64_t end)
{
    bool zero = reads_as_zeros(device, page);
    while (page < end && reads_as_zeros(device, page) == zero) {
        uint64_t block = page / TM_BLOCK_PAGES;
        page = tm_in_index(device, block) ? page + 1 : (block + 1) * TM_BLOCK_PAGES;
    }
    return page < end ? page : end;
}

int tm_extents(struct tm_device *device, uint64_t count, uint64_t offset, struct tm_extent *extents, size_t *n)
{
    uint64_t end = offset + count, last = (end + TM_PAGE - 1) / TM_PAGE;
    size_t room = *n;
    for (*n = 0; *n < room && offset < end;) {
        uint64_t page = offset / TM_PAGE;
        bool zero = reads_as_zeros(device, page);
        uint64_t until = alike_until(device, page, last) * TM_PAGE;
        until = until < end ? until : end;
        if (until <= offset) /* it changed between two looks */
            continue;
        extents[(*n)++] = (struct tm_extent){.offset = offset, .length = until - offset, .zero = zero};
        offset = until;
    }
    return 0;
}
