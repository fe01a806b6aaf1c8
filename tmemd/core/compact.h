/* Compaction: records move together, so that memory which no record needs can be given back. It
 * takes page locks without waiting, so locks of other pages may be held. */
#pragma once

#include "state.h"

/* Whether enough of the pool is free slots for a put without memory to compact. */
bool compact_is_worth(const struct tm_device *device);
/* Let the host have memory back that free slots of any class take, so that a slot that was refused
 * can be had: false when there is nothing to be gained. */
bool compact_reclaim(struct tm_device *device);
