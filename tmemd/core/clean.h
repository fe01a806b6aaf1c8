/* SPDX-License-Identifier: BSD-3-Clause */
/* The file is made to hold what it lacks, so that the bitmap can be cleared, or a flush
 * acknowledged. I/O locks are held over each write. */
#pragma once

#include "state.h"

/* Write the zeros that the file lacks, and clear the bits of regions that are complete and durable
 * in the file then, with no page changed meanwhile: 0 or an errno. The caller holds demote_lock, or
 * no other thread runs yet. */
int clean_regions(struct tm_device *device);
/* Write again every page that is written through and stale in the file, for its last write failed
 * or was killed; the bitmap does not cover these. 0 or an errno. Takes demote_lock. */
int clean_resync(struct tm_device *device);
