/* SPDX-License-Identifier: BSD-3-Clause */
/* A store that was away may have forgotten what it had acknowledged and nobody had synced, for its
 * host may have died. Nothing of that may be called durable before it was looked at again. */
#pragma once

#include "index.h"

/* If the store may have forgotten something, hold against the index what it has in the regions that
 * are not known to be in the file: copies in tmem become dirty again, zeros that are lacking become
 * so again, and pages that are gone are torn. Returns 0 or an errno; EAGAIN: it went away again. */
int recheck_file(struct tm_device *device);
