#include <errno.h>

#include "device.h"

/* Whole pages that are not written through become zeros. */
static int zero_in_memory(struct tm_device *device, uint64_t first, uint32_t n)
{
    int error = tm_mark_and_lock(device, first, n);
    if (error)
        return error;
    for (uint64_t page = first; page < first + n; page++) {
        enum tm_kind kind = tm_kind(tm_word(device, page));
        if (kind != TM_NOWHERE && kind != TM_ZERO)
            tm_replace(device, page, tm_has_file(device) ? TM_ZERO : TM_NOWHERE);
    }
    tm_unlock_run(&device->locks, first, n);
    return 0;
}

/* Whether the page is zeros, and nothing is to be done about it in the file. */
static bool is_zeroed(const struct tm_device *device, uint64_t page)
{
    uint64_t word = tm_word(device, page);
    bool through = tm_is_written_through(device, page);
    return through ? word == TM_NOWHERE && !tm_file_is_doubtful(&device->file)
                   : word == TM_NOWHERE || tm_kind(word) == TM_ZERO;
}

/* Zeros are written to the file where it may hold something else. */
static int zero_in_file(struct tm_device *device, uint64_t first, uint32_t n)
{
    struct tm_io io = {.first = first, .n = n};
    int error = 0;
    tm_io_lock(&device->locks, &io);
    for (uint32_t i = 0, run; i < n && !error; i += run) {
        for (run = 0; i + run < n && !is_zeroed(device, first + i + run); run++)
            ;
        error = run ? tm_overwrite(device, first + i, run, NULL, false, NULL) : 0;
        run = run ? run : 1;
    }
    tm_io_unlock(&device->locks, &io);
    return error;
}

static int zero_run(struct tm_device *device, uint64_t first, uint32_t n)
{
    return tm_is_written_through(device, first) ? zero_in_file(device, first, n) : zero_in_memory(device, first, n);
}

static int zero_pages(struct tm_device *device, uint64_t page, uint64_t end)
{
    int error = 0;
    while (page < end && !error) {
        bool done = is_zeroed(device, page);
        uint32_t run = done ? 1 : tm_alike_run(device, page, end - page);
        error = done ? 0 : zero_run(device, page, run);
        page += run;
    }
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
    enum tm_kind kind = tm_kind(tm_word(device, page));
    return kind == TM_NOWHERE || kind == TM_ZERO;
}

/* The end of the pages from `page` on that are alike, looking no further than `end`. */
static uint64_t alike_until(struct tm_device *device, uint64_t page, uint64_t end)
{
    bool zero = reads_as_zeros(device, page);
    while (page < end && reads_as_zeros(device, page) == zero)
        page++;
    return page;
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
