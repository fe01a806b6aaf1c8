/* SPDX-License-Identifier: BSD-3-Clause */
/* Draining: the file alone holds the device then. It holds demote_lock all the time. */
#include <errno.h>

#include "clean.h"
#include "demote.h"
#include "recheck.h"

enum { DRAINS = 3 }; /* in a row, if the file's server goes away and comes back meanwhile */

static int drain(struct tm_device *device)
{
    uint64_t freed;
    locks_wait_for_pages(&device->locks);
    int error = demote_locked(device, UINT64_MAX, (struct tm_filter){.zeros = true}, &freed);
    if (!error)
        error = clean_regions(device);
    /* A damaged record cannot be moved. Copies of what is being written are no loss. */
    if (!error && !device->ephemeral && atomic_load(&device->counters->pages_in_tmem))
        error = EIO;
    return error;
}

static int drain_once(struct tm_device *device)
{
    int error = state_has_file(device) ? clean_resync(device) : ENOTSUP;
    if (!error)
        error = recheck_file(device); /* before what is in tmem as well is dropped from there */
    if (error)
        return error;
    pthread_mutex_lock(&device->demote_lock);
    atomic_store(&device->budget.draining, true);
    error = drain(device);
    atomic_store(&device->budget.draining, false);
    pthread_mutex_unlock(&device->demote_lock);
    tm_compact(device, UINT64_MAX);
    return error;
}

int tm_drain(struct tm_device *device)
{
    int error = EAGAIN;
    for (int tries = 0; tries < DRAINS && error == EAGAIN; tries++)
        error = drain_once(device);
    return error;
}
