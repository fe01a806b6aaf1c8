/* Generations begin, 1 to TM_ANCIENT in turn (0: all that are older); sums by age are published. */
#pragma once

#include "state.h"

/* Go on with the generation that was current when the pool was last served. */
void aging_init(struct tm_device *device);
