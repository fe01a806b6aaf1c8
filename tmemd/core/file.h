/* SPDX-License-Identifier: BSD-3-Clause */
/* The backing file or source: page n at n x 4096 of a store. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "bounce.h"
#include "fence.h"
#include "local.h"
#include "syncs.h"
#include "tmem.h"

struct file {
    struct store *store;       /* NULL: none */
    struct local local;        /* the store, if it is not another's */
    const struct fence *fence; /* where that is reached all fails with EIO */
    uint64_t bytes;
    _Atomic uint64_t *sync_failed; /* not 0: a sync failed, and what it covered may be lost,
                                      whatever later ones say */
    struct syncs syncs;
};

/* sync_failed is the caller's, in the pool: it outlives the process. */
int file_init(struct file *file, const struct tm_config *config, const struct fence *fence,
              _Atomic uint64_t *sync_failed);
void file_destroy(struct file *file);

/* Whole pages to or from an aligned buffer: 0 or an errno; ESTALE: what must not change has.
 * Beyond the file's end zeros are read. */
int file_read(struct file *file, uint64_t page, uint32_t n, uint8_t *buffer);
/* through: of pages that are written through, so that a store that forgets keeps them at once. */
int file_write(struct file *file, uint64_t page, uint32_t n, const uint8_t *buffer, bool through);
/* Zero n pages. Where the store can, their blocks stay reserved, or (punch) are given back. */
int file_zero(struct file *file, uint64_t page, uint64_t n, bool punch, bool through);
/* Make what was written before the call durable, by one sync for all who ask meanwhile. Once one
 * has failed this fails for ever, for the kernel forgets what it could not write (PostgreSQL's
 * data_sync_retry): 0 or EIO. EAGAIN: a store that was away may have forgotten some of it, so that
 * it must be looked at again (clean_regions does) or written again. */
int file_sync(struct file *file);
/* Likewise, of what was written through. */
static inline int file_sync_through(struct file *file)
{
    return file->store->forgets ? 0 : file_sync(file);
}
/* Whether a write would have to wait for the store to come back. */
static inline bool file_is_away(const struct file *file)
{
    return file->store && file->store->ops->is_away && file->store->ops->is_away(file->store);
}
/* Whether one has failed. */
static inline bool file_is_doubtful(const struct file *file)
{
    return file->store && atomic_load(file->sync_failed);
}
