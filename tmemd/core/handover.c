/* SPDX-License-Identifier: BSD-3-Clause */
/* A device that is written back becomes durable while it is used, and back.
 *
 * 1. It is changing: each write goes to the file first, and its bit is set besides. Whoever has
 *    decided otherwise before decides again under the page lock.
 * 2. Dirty pages are written to the file and stay, clean; then zeros that it lacks.
 * 3. It is durable: no bit is set any more. What was written before is synced, and all bits are
 *    cleared: of what is on its way now nothing was acknowledged, or FLUSH has still to sync it.
 *
 * Back: it is changing again, so that bits are set; when all writes to the file that began before
 * have ended it is synced, and puts need not reach it any more. */
#include <errno.h>

#include "clean.h"
#include "demote.h"
#include "index.h"
#include "recheck.h"

enum { TRIES = 3 }; /* in a row, if the file's server goes away and comes back meanwhile */

static void set_mode(struct tm_device *device, enum state_mode mode)
{
    atomic_store(&device->mode, (uint8_t)mode);
    locks_wait_for_pages(&device->locks);
}

static void wait_for_io(struct tm_device *device)
{
    uint64_t pages = device->layout.pages;
    struct io_range all = {.n = pages < UINT32_MAX ? (uint32_t)pages : UINT32_MAX};
    lock_io(&device->locks, &all);
    unlock_io(&device->locks, &all);
}

static int write_back(struct tm_device *device)
{
    bitmap_wake(&device->bitmap);
    set_mode(device, STATE_CHANGING);
    wait_for_io(device);
    int error = file_sync(&device->file);
    set_mode(device, STATE_WRITE_BACK);
    return error;
}

/* Whether the file lacks a page, even when what is on its way there has arrived. */
static bool is_lacking(struct tm_device *device, uint64_t page)
{
    struct io_range io = {.first = page, .n = 1};
    if (state_is_in_file(device, index_word(device, page)))
        return false;
    lock_io(&device->locks, &io);
    bool lacking = !state_is_in_file(device, index_word(device, page));
    unlock_io(&device->locks, &io);
    return lacking;
}

static int find_lacking(struct tm_device *device)
{
    if (atomic_load(&device->counters->pages_lost))
        return ENODATA;
    for (uint64_t page = 0; page < device->layout.pages; page++)
        if (is_lacking(device, page))
            return EIO;
    return 0;
}

static int copy_to_file(struct tm_device *device)
{
    uint64_t freed;
    int error =
        demote_locked(device, UINT64_MAX, (struct tm_filter){.keep = true, .zeros = true}, &freed);
    if (!error)
        error = clean_regions(device);
    return error ? error : find_lacking(device);
}

static int write_through(struct tm_device *device)
{
    set_mode(device, STATE_CHANGING);
    int error = copy_to_file(device);
    if (!error) {
        set_mode(device, STATE_DURABLE);
        error = file_sync(&device->file);
        if (!error)
            error = bitmap_rest(&device->bitmap);
    }
    if (error)
        write_back(device);
    return error;
}

static int change(struct tm_device *device, bool on)
{
    int error = clean_resync(device);
    if (!error)
        error = recheck_file(device);
    if (error)
        return error;
    pthread_mutex_lock(&device->demote_lock);
    if (on != state_is_durable(device))
        error = on ? write_through(device) : write_back(device);
    pthread_mutex_unlock(&device->demote_lock);
    return error;
}

int tm_write_through(struct tm_device *device, bool on)
{
    int error = state_has_file(device) && !device->ephemeral ? EAGAIN : ENOTSUP;
    for (int tries = 0; tries < TRIES && error == EAGAIN; tries++)
        error = change(device, on);
    return error;
}
