#include <errno.h>
#include <string.h>

#include "device.h"

/* Write pages to the file, and put them besides or (spilling them) not. */
static int write_to_file(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, bool put)
{
    struct tm_io io = {.first = first, .n = n};
    if (!tm_has_file(device))
        return EIO;
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    memcpy(bounce->pages, content, (size_t)n * TM_PAGE);
    tm_io_lock(&device->locks, &io);
    int error = tm_overwrite(device, first, n, bounce->pages, put, NULL);
    tm_io_unlock(&device->locks, &io);
    tm_bounce_put(&device->file, bounce);
    return error;
}

/* Spill what was refused, neighbours together. */
static int spill(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, const bool *stored)
{
    int error = 0;
    for (uint32_t i = 0, run; i < n && !error; i += run) {
        for (run = 1; i + run < n && stored[i + run] == stored[i]; run++)
            ;
        if (!stored[i])
            error = write_to_file(device, first + i, run, content + (size_t)i * TM_PAGE, false);
    }
    return error;
}

/* Write n <= TM_RUN_MAX whole pages, all written through or none. */
static int write_pages(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content)
{
    bool stored[TM_RUN_MAX];
    if (tm_is_written_through(device, first))
        return write_to_file(device, first, n, content, true);
    int error = tm_mark_and_lock(device, first, n);
    if (error)
        return error;
    for (uint32_t i = 0; i < n; i++)
        stored[i] = tm_put(device, first + i, content + (size_t)i * TM_PAGE, false);
    tm_unlock_run(&device->locks, first, n);
    return spill(device, first, n, content, stored);
}

/* Less than a page of new content. */
struct part {
    const uint8_t *bytes;
    uint32_t from, count;
};

/* What the page will be: the new bytes, around them what it holds. That is zeros behind the end of the device, so a last page
 * that is written up to there need not be readable. Returns the error with which what it holds could not be read. */
static int merge(const struct tm_device *device, uint64_t page, const struct part *part, uint8_t *content, int unread)
{
    if (unread && (part->from || page * TM_PAGE + part->count != device->size))
        return unread;
    if (unread)
        memset(content, 0, TM_PAGE);
    memcpy(content + part->from, part->bytes, part->count);
    return 0;
}

/* Write part of a page that is not in the file, if its put is not refused: EAGAIN otherwise. */
static int put_part(struct tm_device *device, uint64_t page, const struct part *part)
{
    uint8_t content[TM_PAGE];
    uint64_t word;
    int error = tm_mark_and_lock(device, page, 1);
    if (error)
        return error;
    error = tm_read_memory(device, page, content, &word);
    if (error != EAGAIN)
        error = merge(device, page, part, content, error);
    if (!error && !tm_put(device, page, content, false))
        error = EAGAIN;
    tm_unlock_run(&device->locks, page, 1);
    return error;
}

/* Fill `content` with what the page will be, under its I/O lock, so that a change after that is noticed: who puts or trims a page
 * takes its mark away, and none comes back to the file. */
static int read_and_merge(struct tm_device *device, uint64_t page, const struct part *part, uint8_t *content)
{
    uint64_t word;
    int error = tm_mark_and_lock(device, page, 1);
    if (error)
        return error;
    int unread = tm_read_memory(device, page, content, &word);
    if (unread != EAGAIN)
        error = merge(device, page, part, content, unread);
    if (unread != EAGAIN && !error)
        tm_start_writing(device, page);
    tm_unlock_run(&device->locks, page, 1);
    if (unread != EAGAIN)
        return error;
    unread = tm_read_ordered(device, page, content, &word);
    return merge(device, page, part, content, unread);
}

/* Write part of a page by way of the file. */
static int overwrite_part(struct tm_device *device, uint64_t page, const struct part *part)
{
    struct tm_io io = {.first = page, .n = 1};
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    bool changed = true;
    int error = 0;
    tm_io_lock(&device->locks, &io);
    while (!error && changed) {
        error = read_and_merge(device, page, part, bounce->pages);
        if (!error)
            error = tm_overwrite(device, page, 1, bounce->pages, true, &changed);
    }
    tm_io_unlock(&device->locks, &io);
    tm_bounce_put(&device->file, bounce);
    return error;
}

static int write_part(struct tm_device *device, uint64_t page, const struct part *part)
{
    int error = tm_is_written_through(device, page) ? EAGAIN : put_part(device, page, part);
    if (error != EAGAIN)
        return error;
    return tm_has_file(device) ? overwrite_part(device, page, part) : EIO;
}

int tm_write(struct tm_device *device, const void *buffer, uint32_t count, uint64_t offset, bool fua)
{
    const uint8_t *bytes = buffer;
    int error = 0;
    tm_count(&device->counters->writes, 1);
    while (count && !error) {
        uint64_t page = offset / TM_PAGE;
        uint32_t from = (uint32_t)(offset % TM_PAGE), length = TM_PAGE - from;
        if (from || count < TM_PAGE) {
            length = length < count ? length : count;
            error = write_part(device, page, &(struct part){.bytes = bytes, .from = from, .count = length});
        } else {
            length = tm_alike_run(device, page, count / TM_PAGE) * TM_PAGE;
            error = write_pages(device, page, length / TM_PAGE, bytes);
        }
        bytes += length;
        offset += length;
        count -= length;
    }
    if (!error && fua)
        error = tm_flush(device);
    return error ? EIO : 0;
}
