/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages come back from the file into tmem. A page that somebody is changing stays: no waiting. */
#pragma once

#include "fetch.h"

/* A guest reads 8 pages around the one it needs; a longer read is a copy, not a fault. */
enum { TM_FAULT_MAX = 8 };

/* Put what the file holds, under the page lock; `again`: TM_WORD_AGAIN or 0. */
bool promote_put(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t again);
/* Put a page that was read from the file under `word`; false when it is not stored. Takes its page
 * lock, or gives up. */
bool promote_page(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word);
/* Put those of n pages that were read from the file under these words and are in use, if there is
 * room to spare. */
void promote_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
                 const uint8_t *content);
