/* SPDX-License-Identifier: BSD-3-Clause */
/* Generations begin, 1 to TM_ANCIENT in turn (0: all that are older); sums by age are published. */
#pragma once

#include "state.h"

/* What tm_begin_generation does if the pool is not ephemeral. */
void aging_begin_generation(struct tm_device *device);
/* Go on with the generation that was current when the pool was last served. */
void aging_init(struct tm_device *device);
