/* SPDX-License-Identifier: BSD-3-Clause */
/* Read requests. They take no lock by themselves. */
#include <errno.h>
#include <string.h>

#include "admit.h"
#include "prefetch.h"
#include "promote.h"

/* Get a page, and wait for one that is being fetched ahead; it counts among `ahead` if it had been.
 */
static int get(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word,
               bool *is_ahead)
{
    int error = page_get(device, page, content, word);
    if (error == EAGAIN && prefetch_wait(device, page))
        error = page_get(device, page, content, word);
    *is_ahead |= word_is_ahead(*word);
    return error;
}

/* Read n <= TM_RUN_MAX whole pages. */
static int read_pages(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    uint64_t words[TM_RUN_MAX];
    page_set missing = 0;
    int error = 0;
    bool is_ahead = false;
    for (uint32_t i = 0; i < n && !error; i++) {
        error = get(device, first + i, content + (size_t)i * TM_PAGE, &words[i], &is_ahead);
        if (error != EAGAIN)
            continue;
        if (!missing)
            prefetch_learn(device, first, n, is_ahead);
        missing |= page_bit(i);
        error = 0;
    }
    if (is_ahead && !missing)
        prefetch_learn(device, first, n, true);
    if (!error)
        error = fetch_pages(device, first, missing, words, content);
    if (!error)
        (device->ephemeral ? admit_run : promote_run)(device, first, n, words, content);
    return error;
}

static int read_part(struct tm_device *device, uint64_t page, uint32_t from, uint32_t count,
                     uint8_t *buffer)
{
    uint8_t content[TM_PAGE];
    int error = read_pages(device, page, 1, content);
    if (!error)
        memcpy(buffer, content + from, count);
    return error;
}

static int read_inside(struct tm_device *device, void *buffer, uint32_t count, uint64_t offset)
{
    uint8_t *to = buffer;
    int error = 0;
    stats_add(&device->counters->reads, 1);
    while (count && !error) {
        uint64_t page = offset / TM_PAGE;
        uint32_t from = (uint32_t)(offset % TM_PAGE), length = TM_PAGE - from;
        if (from || count < TM_PAGE) {
            length = length < count ? length : count;
            error = read_part(device, page, from, length, to);
        } else {
            uint32_t n = count / TM_PAGE < TM_RUN_MAX ? count / TM_PAGE : TM_RUN_MAX;
            length = n * TM_PAGE;
            error = read_pages(device, page, n, to);
        }
        to += length;
        offset += length;
        count -= length;
    }
    return error;
}

int tm_read(struct tm_device *device, void *buffer, uint32_t count, uint64_t offset)
{
    if (!fence_enter(&device->fence))
        return EIO;
    int error = read_inside(device, buffer, count, offset);
    fence_leave(&device->fence);
    return error;
}
