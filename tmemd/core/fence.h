/* SPDX-License-Identifier: BSD-3-Clause */
/* Until when a device whose backing other hosts can reach may be served: its owner's lease is kept
 * elsewhere (tmemd.device.lease), and here is only what makes it bind. From that time on each
 * request fails, and each look at the backing, whoever is asleep or was stopped meanwhile. */
#pragma once

#include <stdbool.h>

#include "layout.h"

struct fence {
    _Atomic uint64_t *at;    /* ns of CLOCK_BOOTTIME, the caller's; NULL: there is no lease */
    uint64_t wait_ns;        /* how long requests wait for it to be put off */
    _Atomic bool stopped;    /* no request is let in */
    _Atomic uint64_t inside; /* requests */
};

/* Whether it is reached. The clock goes on while the host sleeps, and costs what any does. */
bool fence_is_reached(const struct fence *fence);

/* Before and after each request; one that is not let in fails. While it is reached none is let in,
 * and they wait: for what the owner has in RAM is the newest only if nobody has taken the device.
 */
bool fence_enter(struct fence *fence);
void fence_leave(struct fence *fence);

/* Let no request in any more, and wait until those inside are done. */
void fence_stop(struct fence *fence);
