/* SPDX-License-Identifier: BSD-3-Clause */
/* Where bytes are kept that are not in RAM: a local file or block device (local.c), or what an NBD
 * server exports (remote.c). Offsets and lengths are bytes; a call returns 0 or an errno, and may
 * be made from any thread. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct store;
struct fence;

struct store_ops {
    int (*read)(struct store *store, uint64_t offset, size_t length, void *buffer);
    /* through: where a sync may come too late, for the store may go away and forget before it, the
     * bytes are durable when this returns. */
    int (*write)(struct store *store, uint64_t offset, size_t length, const void *buffer,
                 bool through);
    /* Zero; punch: the blocks may be given back. ENOTSUP: it takes writes of zeros. */
    int (*zero)(struct store *store, uint64_t offset, uint64_t length, bool punch, bool through);
    /* Make durable what was written before the call. EAGAIN: some of that may be forgotten, and
     * must be looked at again. */
    int (*sync)(struct store *store);
    /* Whether a write would have to wait for it to come back. NULL: never. */
    bool (*is_away)(struct store *store);
};

struct store {
    const struct store_ops *ops;
    bool forgets; /* it may go away, and come back without what was not synced */
    bool trims;   /* it gives room back for what is zeroed, and none is reserved for us there */
    _Atomic bool
        *unsure; /* it may have; who looks at what it holds clears this first. NULL: never */
    _Atomic bool *inherited; /* who was here before us may have left what is not synced: set by who
                                serves its pages, cleared by a sync. NULL: all syncs cover that */
    _Atomic bool *sync_failed;     /* a sync has, that came with a write of others. NULL: never */
    const _Atomic uint64_t *apart; /* how many pages do not lie where the rest does, which may be
                                      away. NULL: none */
    const struct fence *fence; /* of who serves its pages, who sets it: once it is reached nothing
                                  more is sent, however long it has waited. NULL: none */
};

/* A write that goes through has failed: say so in the pool, where this lasts, if it was the sync.
 */
static inline void store_note_failure(const struct store *store, _Atomic uint64_t *sync_failed)
{
    if (store->sync_failed && atomic_load(store->sync_failed))
        atomic_store(sync_failed, 1);
}

/* One has failed before, says the pool. */
static inline void store_recall_failure(const struct store *store, _Atomic uint64_t *sync_failed)
{
    if (store->sync_failed && atomic_load(sync_failed))
        atomic_store(store->sync_failed, true);
}
