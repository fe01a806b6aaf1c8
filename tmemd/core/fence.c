/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "fence.h"

#include <stddef.h>
#include <time.h>

#include "tmem.h"

static const struct timespec MOMENT = {.tv_nsec = 1000000};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

bool fence_is_reached(const struct fence *fence)
{
    return fence->at && now_ns() >= atomic_load(fence->at);
}

static bool try_enter(struct fence *fence)
{
    atomic_fetch_add(&fence->inside, 1);
    if (!atomic_load(&fence->stopped) && !fence_is_reached(fence))
        return true;
    fence_leave(fence);
    return false;
}

static bool may_be_put_off(const struct fence *fence)
{
    return !atomic_load(&fence->stopped) && atomic_load(fence->at) != TM_LEASE_LOST;
}

static bool wait_to_enter(struct fence *fence)
{
    uint64_t end = now_ns() + fence->wait_ns;
    while (may_be_put_off(fence) && now_ns() < end) {
        nanosleep(&MOMENT, NULL);
        if (try_enter(fence))
            return true;
    }
    return false;
}

bool fence_enter(struct fence *fence)
{
    return !fence->at || try_enter(fence) || wait_to_enter(fence);
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
