/* SPDX-License-Identifier: BSD-3-Clause */
/* Demotion, for those who hold demote_lock already; others use tm_demote. */
#pragma once

#include "state.h"

/* What tm_demote does, under demote_lock. */
int demote_locked(struct tm_device *device, uint64_t bytes, struct tm_filter choice,
                  uint64_t *freed);
