/* SPDX-License-Identifier: BSD-3-Clause */
/* Attaching to a pool makes what its last process left whole, before other threads run: no lock. */
#pragma once

#include "state.h"

/* Allocate the whole index within the limit, so that later changes never need memory for it;
 * rebuild counters and live slots from it. Pages that the file may lack get their bit in the
 * bitmap, or are counted as stale. Returns 0 or an errno; *error (of error_size bytes) says what is
 * wrong, or is left alone. */
int attach_index(struct tm_device *device, char *error, size_t error_size);
