/* SPDX-License-Identifier: BSD-3-Clause */
/* Compaction: records move together, so that memory which no record needs can be given back. It
 * takes page locks without waiting, so locks of other pages may be held. */
#pragma once

#include "state.h"

/* Whether enough of the pool is free slots for a put without memory to compact. */
bool compact_is_worth(const struct tm_device *device);
/* Compact until a page is punched out, so that a refused allocation can be tried again; false when
 * there is none to be had. */
bool compact_reclaim(struct tm_device *device);
