/* The generations in which pages were used: 1 to TM_ANCIENT in turn, and 0 for all that are older.
 */
#pragma once

#include "state.h"

/* Go on with the generation that was current when the pool was last served. */
void aging_init(struct tm_device *device);
