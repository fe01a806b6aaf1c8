/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages that the guest has trimmed and the file still holds, where that is a store that gives room
 * back: a neighbour's RAM, a thin image. A trim only changes the index; the store is told later
 * (tm_pass_trims), in whole runs, of those that nobody has written since. What is forgotten of them
 * costs room there, and nothing else. */
#pragma once

#include "state.h"

int dead_init(struct tm_device *device);
void dead_destroy(struct tm_device *device);
/* A page becomes zeros, and `word` was its word before. Under its page lock. */
void dead_note(struct tm_device *device, uint64_t page, uint64_t word);
