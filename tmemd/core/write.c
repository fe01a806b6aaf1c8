/* SPDX-License-Identifier: BSD-3-Clause */
/* Write requests. Of a page's new content
 *
 *                     whole pages (write_pages)             less than a page (write_part)
 * write-back          put; what is refused is spilled       merged and put; what is in the file, or
 *                                                           refused, as if it were written through
 * written through     the file, then put                    read, merged, the file, then put
 * ephemeral           the file, then offered to admission   the same
 * without a file      put, or EIO                           merged and put, or EIO
 */
#include <errno.h>
#include <string.h>

#include "admit.h"
#include "bounce.h"
#include "clean.h"
#include "fetch.h"
#include "overwrite.h"

/* Overwrite by way of a buffer. */
static int write_run(struct tm_device *device, struct overwrite *run, const uint8_t *content)
{
    if (!state_has_file(device))
        return EIO;
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    uint64_t words[TM_RUN_MAX];
    run->content = bounce->pages;
    run->words = words;
    memcpy(bounce->pages, content, (size_t)run->n * TM_PAGE);
    int error = overwrite_run(device, run);
    if (!error && device->ephemeral)
        admit_run(device, run->first, run->n, words, bounce->pages);
    bounce_put(bounce);
    return error;
}

/* Spill what was refused, with what lies between. */
static int spill(struct tm_device *device, uint64_t first, page_set refused, const uint8_t *content)
{
    int error = 0;
    while (refused && !error) {
        struct stretch stretch = stretch_first(refused, STRETCH_GAP);
        struct overwrite run = {
            .first = first + stretch.start, .n = stretch.n, .stored = ~(refused >> stretch.start)};
        error = write_run(device, &run, content + (size_t)stretch.start * TM_PAGE);
        refused = pages_after(refused, stretch.start + run.n);
    }
    return error;
}

static int write_through(struct tm_device *device, uint64_t first, uint32_t n,
                         const uint8_t *content)
{
    struct overwrite run = {.first = first, .n = n, .put = !device->ephemeral};
    return write_run(device, &run, content);
}

/* Write n <= TM_RUN_MAX whole pages, all written through or none. */
static int write_pages(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content)
{
    page_set refused = 0;
    if (state_is_written_through(device, first))
        return write_through(device, first, n, content);
    int error = overwrite_lock_pages(device, first, n);
    if (error)
        return error;
    if (state_is_written_through(device, first)) { /* now it is */
        unlock_pages(&device->locks, first, n);
        return write_through(device, first, n, content);
    }
    for (uint32_t i = 0; i < n; i++)
        if (!page_put(device, first + i, content + (size_t)i * TM_PAGE, false))
            refused |= page_bit(i);
    unlock_pages(&device->locks, first, n);
    return spill(device, first, refused, content);
}

/* Less than a page of new content. */
struct part {
    const uint8_t *bytes;
    uint32_t from, count;
};

/* What the page will be: the new bytes, around them what it holds. That is zeros behind the end of
 * the device, so a last page that is written up to there need not be readable. Returns the error
 * with which what it holds could not be read. */
static int merge(const struct tm_device *device, uint64_t page, const struct part *part,
                 uint8_t *content, int unread)
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
    int error = overwrite_lock_pages(device, page, 1);
    if (error)
        return error;
    error =
        state_is_written_through(device, page) ? EAGAIN : page_get(device, page, content, &word);
    if (error != EAGAIN)
        error = merge(device, page, part, content, error);
    if (!error && !page_put(device, page, content, false))
        error = EAGAIN;
    unlock_pages(&device->locks, page, 1);
    return error;
}

/* Fill `content` with what the page will be, under its I/O lock, and mark the page unless it is in
 * the file: a put or trim clears the mark, which is_as_read then sees. */
static int read_and_merge(struct tm_device *device, uint64_t page, const struct part *part,
                          uint8_t *content)
{
    uint64_t word;
    lock_pages(&device->locks, page, 1);
    int error = page_get(device, page, content, &word);
    bool is_in_file = error == EAGAIN;
    if (!is_in_file)
        error = merge(device, page, part, content, error);
    if (!error)
        index_update(device, page, word_writing(index_word(device, page), 0));
    unlock_pages(&device->locks, page, 1);
    return is_in_file ? merge(device, page, part, content, fetch_page(device, page, content, &word))
                      : error;
}

/* Whether nobody has changed the page since its content was read and it was marked. */
static bool is_as_read(const struct tm_device *device, uint64_t page)
{
    uint64_t word = index_word(device, page);
    return word_kind(word) == TM_FILE || word_is_writing(word);
}

/* Write part of a page by way of the file. */
static int overwrite_part(struct tm_device *device, uint64_t page, const struct part *part)
{
    struct io_range io = {.first = page, .n = 1};
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    struct overwrite run = {.first = page,
                            .content = bounce->pages,
                            .put = !device->ephemeral,
                            .is_wanted = device->ephemeral ? NULL : is_as_read};
    int error = 0;
    lock_io(&device->locks, &io);
    while (!error && !run.n_completed) {
        run.n = 1;
        error = read_and_merge(device, page, part, bounce->pages);
        if (!error)
            error = overwrite_locked(device, &run);
    }
    unlock_io(&device->locks, &io);
    bounce_put(bounce);
    return error;
}

static int write_part(struct tm_device *device, uint64_t page, const struct part *part)
{
    int error = state_is_written_through(device, page) ? EAGAIN : put_part(device, page, part);
    if (error != EAGAIN)
        return error;
    return state_has_file(device) ? overwrite_part(device, page, part) : EIO;
}

static int write_inside(struct tm_device *device, const void *buffer, uint32_t count,
                        uint64_t offset, bool fua)
{
    const uint8_t *bytes = buffer;
    int error = 0;
    stats_add(&device->counters->writes, 1);
    while (count && !error) {
        uint64_t page = offset / TM_PAGE;
        uint32_t from = (uint32_t)(offset % TM_PAGE), length = TM_PAGE - from;
        if (from || count < TM_PAGE) {
            length = length < count ? length : count;
            error = write_part(device, page,
                               &(struct part){.bytes = bytes, .from = from, .count = length});
        } else {
            length = state_alike_run(device, page, count / TM_PAGE) * TM_PAGE;
            error = write_pages(device, page, length / TM_PAGE, bytes);
        }
        bytes += length;
        offset += length;
        count -= length;
    }
    return !error && fua ? tm_flush(device) : error;
}

int tm_write(struct tm_device *device, const void *buffer, uint32_t count, uint64_t offset,
             bool fua)
{
    if (!fence_enter(&device->fence))
        return EIO;
    int error = write_inside(device, buffer, count, offset, fua);
    fence_leave(&device->fence);
    return error;
}
