/* Attaching to a pool makes what its last process left whole, before other threads run: no lock. */
#pragma once

#include "state.h"

/* Allocate what is missing of the index, all of it within the limit, so that no later change fails
 * for want of memory; rebuild from it what is counted, and what slots are live. Pages that the file
 * may lack are marked in the bitmap, or counted as amiss. Returns 0 or an errno; *error (of
 * error_size bytes) says what is wrong, or is left alone. */
int attach_index(struct tm_device *device, char *error, size_t error_size);
