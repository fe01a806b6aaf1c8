/* SPDX-License-Identifier: BSD-3-Clause */
/* Bits change in a mapping, which outlives us; what must outlive the host is synced, a page before
 * its bit. A page that was written back has a bit that is durably clear before the server can get a
 * newer one. Once a sync has failed nothing more is durable here, and only writing back goes on:
 * that dirties all that it needs anew. Whoever writes has the page's I/O lock of the device; the
 * locks here keep writing back out. */
#define _GNU_SOURCE
#include "overflow.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "bounce.h"
#include "local.h"
#include "locks.h"
#include "remote.h"
#include "syncs.h"
#include "tmem.h"

enum { BITS_OFFSET = TM_PAGE };

struct overflow {
    struct store store;
    struct remote *remote;
    struct local local;
    uint64_t pages;
    _Atomic uint8_t *bits; /* mapped; each changes under its page's lock */
    _Atomic uint64_t count;
    uint64_t next; /* where writing back goes on; its caller's */
    struct locks locks;
    struct syncs syncs;
};

static struct overflow *overflow_of(struct store *store) { return (struct overflow *)store; }

static uint64_t bits_bytes(uint64_t pages)
{
    return (pages + 8 * TM_PAGE - 1) / (8 * TM_PAGE) * TM_PAGE;
}

static uint64_t place_of(const struct overflow *overflow, uint64_t page)
{
    return BITS_OFFSET + bits_bytes(overflow->pages) + page * TM_PAGE;
}

uint64_t overflow_file_bytes(uint64_t pages)
{
    return BITS_OFFSET + bits_bytes(pages) + pages * TM_PAGE;
}

uint64_t overflow_count(const struct overflow *overflow) { return atomic_load(&overflow->count); }

static bool is_here(const struct overflow *overflow, uint64_t page)
{
    return atomic_load(&overflow->bits[page / 8]) >> page % 8 & 1;
}

static void set_here(struct overflow *overflow, uint64_t page)
{
    uint8_t bit = (uint8_t)(1 << page % 8);
    if (!(atomic_fetch_or(&overflow->bits[page / 8], bit) & bit))
        atomic_fetch_add(&overflow->count, 1);
}

static void set_gone(struct overflow *overflow, uint64_t page)
{
    uint8_t bit = (uint8_t)(1 << page % 8);
    if (atomic_fetch_and(&overflow->bits[page / 8], (uint8_t)~bit) & bit)
        atomic_fetch_sub(&overflow->count, 1);
}

/* Pages from `page` on, at most n, that are all here or all not. */
static uint32_t alike(const struct overflow *overflow, uint64_t page, uint64_t n)
{
    uint32_t run = 1;
    while (run < n && run < TM_RUN_MAX && is_here(overflow, page + run) == is_here(overflow, page))
        run++;
    return run;
}

static bool has_any(const struct overflow *overflow, uint64_t first, uint64_t n)
{
    for (uint64_t page = first; overflow_count(overflow) && page < first + n; page++)
        if (is_here(overflow, page))
            return true;
    return false;
}

static uint64_t pages_of(uint64_t bytes) { return (bytes + TM_PAGE - 1) / TM_PAGE; }

/* Read a run that was here when somebody looked; it may have been written back since. */
static int read_run(struct overflow *overflow, uint64_t first, uint32_t n, size_t length,
                    uint8_t *buffer)
{
    struct store *local = &overflow->local.store;
    struct io_range io = {.first = first, .n = n};
    lock_io(&overflow->locks, &io);
    bool here = alike(overflow, first, n) == n && is_here(overflow, first);
    int error = here ? local->ops->read(local, place_of(overflow, first), length, buffer) : EAGAIN;
    unlock_io(&overflow->locks, &io);
    return error;
}

static int read_op(struct store *store, uint64_t offset, size_t length, void *buffer)
{
    struct overflow *overflow = overflow_of(store);
    int error = 0;
    if (!overflow_count(overflow))
        return remote_read(overflow->remote, offset, length, buffer);
    for (size_t done = 0, n; done < length && !error; done += n) {
        uint64_t page = (offset + done) / TM_PAGE;
        uint32_t run = alike(overflow, page, pages_of(length - done));
        uint8_t *at = (uint8_t *)buffer + done;
        n = (size_t)run * TM_PAGE < length - done ? (size_t)run * TM_PAGE : length - done;
        error = is_here(overflow, page) ? read_run(overflow, page, run, n, at)
                                        : remote_read(overflow->remote, offset + done, n, at);
        if (error == EAGAIN)
            error = n = 0; /* look again */
    }
    return error;
}

static int sync_local(void *owner)
{
    struct overflow *overflow = owner;
    int error = overflow->local.store.ops->sync(&overflow->local.store);
    if (error)
        atomic_store(overflow->store.sync_failed, true);
    return error;
}

static int sync_here(struct overflow *overflow)
{
    return syncs_join(&overflow->syncs, sync_local, overflow);
}

/* With the run's lock. */
static int write_here(struct overflow *overflow, uint64_t first, size_t length, const void *buffer,
                      bool through)
{
    struct store *local = &overflow->local.store;
    if (through && atomic_load(overflow->store.sync_failed))
        return EIO;
    int error = local->ops->write(local, place_of(overflow, first), length, buffer, false);
    if (!error && through)
        error = sync_here(overflow);
    for (uint64_t i = 0; i < pages_of(length) && !error; i++)
        set_here(overflow, first + i);
    return error || !through ? error : sync_here(overflow);
}

static int write_op(struct store *store, uint64_t offset, size_t length, const void *buffer,
                    bool through)
{
    struct overflow *overflow = overflow_of(store);
    struct io_range io = {.first = offset / TM_PAGE, .n = (uint32_t)pages_of(length)};
    lock_io(&overflow->locks, &io);
    bool stays = has_any(overflow, io.first, io.n),
         here = stays || remote_is_away(overflow->remote);
    int error = here ? ETIMEDOUT : remote_write(overflow->remote, offset, length, buffer, through);
    if (error == ETIMEDOUT)
        error = write_here(overflow, io.first, length, buffer, through);
    if (error == ENOSPC && !stays) /* it waits as if there were no such file */
        error = remote_write_patiently(overflow->remote, offset, length, buffer, through);
    unlock_io(&overflow->locks, &io);
    return error;
}

static int zero_op(struct store *store, uint64_t offset, uint64_t length, bool punch, bool through)
{
    struct overflow *overflow = overflow_of(store);
    struct store *remote = remote_store(overflow->remote);
    struct io_range io = {.first = offset / TM_PAGE, .n = (uint32_t)pages_of(length)};
    lock_io(&overflow->locks, &io);
    bool here = remote_is_away(overflow->remote) || has_any(overflow, io.first, io.n);
    int error = here ? ETIMEDOUT : remote->ops->zero(remote, offset, length, punch, through);
    unlock_io(&overflow->locks, &io);
    return error == ETIMEDOUT ? ENOTSUP : error;
}

static int sync_op(struct store *store)
{
    struct overflow *overflow = overflow_of(store);
    struct store *remote = remote_store(overflow->remote);
    int error = sync_here(overflow);
    return error ? error : remote->ops->sync(remote);
}

static const struct store_ops ops = {read_op, write_op, zero_op, sync_op, NULL};

/* The server has the pages. Where that cannot be made durable, newer ones come here, too. */
static int forget_run(struct overflow *overflow, uint64_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        set_gone(overflow, first + i);
    int error = sync_here(overflow);
    for (uint32_t i = 0; i < n && error; i++)
        set_here(overflow, first + i);
    return error;
}

/* Write a run of pages back, and give their blocks back to the file system. */
static int write_back_run(struct overflow *overflow, uint64_t first, uint32_t n, uint8_t *content)
{
    struct store *local = &overflow->local.store;
    size_t length = (size_t)n * TM_PAGE,
           there = (size_t)(remote_size(overflow->remote) - first * TM_PAGE);
    struct io_range io = {.first = first, .n = n};
    lock_io(&overflow->locks, &io);
    int error = local->ops->read(local, place_of(overflow, first), length, content);
    if (!error)
        error = remote_write(overflow->remote, first * TM_PAGE, length < there ? length : there,
                             content, true);
    if (!error)
        error = forget_run(overflow, first, n);
    if (!error)
        local->ops->zero(local, place_of(overflow, first), length, true, false);
    unlock_io(&overflow->locks, &io);
    return error;
}

int overflow_write_back(struct overflow *overflow)
{
    struct bounce *bounce = overflow_count(overflow) ? bounce_get() : NULL;
    if (!bounce)
        return overflow_count(overflow) ? ENOMEM : 0;
    uint64_t page = overflow->next;
    for (uint64_t looked = 0; looked < overflow->pages && !is_here(overflow, page); looked++)
        page = (page + 1) % overflow->pages;
    uint32_t n = alike(overflow, page, overflow->pages - page);
    int error = is_here(overflow, page) ? write_back_run(overflow, page, n, bounce->pages) : 0;
    overflow->next = (page + n) % overflow->pages;
    bounce_put(bounce);
    return error;
}

/* Bits that a process has left which was killed before it could sync them, or failed to: what is
 * written is dirty again. */
static int make_durable(struct overflow *overflow)
{
    struct store *local = &overflow->local.store;
    int error = local->ops->write(local, BITS_OFFSET, bits_bytes(overflow->pages),
                                  (const void *)overflow->bits, false);
    return error ? error : local->ops->sync(local);
}

static int map_bits(struct overflow *overflow)
{
    uint64_t bytes = bits_bytes(overflow->pages);
    void *bits =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, overflow->local.fd, BITS_OFFSET);
    if (bits == MAP_FAILED)
        return errno;
    overflow->bits = bits;
    for (uint64_t page = 0; page < overflow->pages; page++)
        overflow->count += is_here(overflow, page);
    return make_durable(overflow);
}

int overflow_new(struct remote *remote, int fd, uint64_t pages, struct overflow **made)
{
    struct overflow *overflow = calloc(1, sizeof *overflow);
    if (!overflow)
        return ENOMEM;
    struct store *behind = remote_store(remote);
    overflow->store = *behind;
    overflow->store.ops = &ops;
    overflow->store.apart = &overflow->count;
    overflow->remote = remote;
    remote_be_brief(remote);
    overflow->pages = pages;
    locks_init(&overflow->locks);
    syncs_init(&overflow->syncs);
    int error = local_init(&overflow->local, fd, true, false);
    if (!error)
        error = map_bits(overflow);
    if (error)
        overflow_free(overflow);
    else
        *made = overflow;
    return error;
}

void overflow_free(struct overflow *overflow)
{
    if (overflow->bits)
        munmap((void *)overflow->bits, bits_bytes(overflow->pages));
    local_destroy(&overflow->local);
    locks_destroy(&overflow->locks);
    syncs_destroy(&overflow->syncs);
    free(overflow);
}

struct store *overflow_store(struct overflow *overflow) { return &overflow->store; }
