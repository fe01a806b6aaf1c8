/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages are fetched ahead of requests that miss, along the trend of what they read, where a miss
 * takes long. Threads of the device's own read them from the file and put them, clean and older
 * than all others, in memory that nobody needs. No lock is held over file I/O. */
#pragma once

#include "index.h"

/* For a device whose other parts are ready. */
void prefetch_init(struct tm_device *device, enum tm_prefetch mode);
/* A read of n <= TM_RUN_MAX pages missed, or `hit` pages that had been fetched ahead: learn from
 * it, and have threads fetch what comes next. Misses: before the file is read. */
void prefetch_learn(struct tm_device *device, uint64_t first, uint32_t n, bool hit);
/* Wait for a page that was in the file, if it is being fetched. True: look again where it is. */
static inline bool prefetch_wait(struct tm_device *device, uint64_t page)
{
    return ahead_wait(&device->prefetch.ahead, page) || word_is_ahead(index_word(device, page));
}
