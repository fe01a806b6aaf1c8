/* SPDX-License-Identifier: BSD-3-Clause */
/* Which pages of an ephemeral pool's source come into tmem. Readers only copy what they have read;
 * threads of the device's own put the copies, evicting others, under page locks and demote_lock. */
#pragma once

#include "state.h"

/* Offer n pages that the source was found to hold, or was given, under these words. */
void admit_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
               const uint8_t *content);
