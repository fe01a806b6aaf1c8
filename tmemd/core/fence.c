/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "fence.h"

#include <stddef.h>
#include <time.h>

static const struct timespec MOMENT = {.tv_nsec = 1000000};

bool fence_is_reached(const struct fence *fence)
{
    struct timespec now;
    if (!fence->at)
        return false;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec >= atomic_load(fence->at);
}

bool fence_enter(struct fence *fence)
{
    if (!fence->at)
        return true;
    atomic_fetch_add(&fence->inside, 1);
    if (!atomic_load(&fence->stopped) && !fence_is_reached(fence))
        return true;
    fence_leave(fence);
    return false;
}

void fence_leave(struct fence *fence)
{
    if (fence->at)
        atomic_fetch_sub(&fence->inside, 1);
}

void fence_stop(struct fence *fence)
{
    atomic_store(&fence->stopped, true);
    while (atomic_load(&fence->inside))
        nanosleep(&MOMENT, NULL);
}
