/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages are read from the file, and checked. Runs are read without a lock: what was overwritten
 * meanwhile does not have the checksum that the index said, and is read again under its I/O lock.
 */
#pragma once

#include "page.h"
#include "stretch.h"

/* Read the pages of the run from `first` on that are `missing`, for they are in the file as `words`
 * say: 0 or an errno. `words` and `content` are those of the whole run. If a page has changed
 * meanwhile its word here gets TM_WORD_WRITING: do not promote it. Takes I/O locks of these. */
int fetch_pages(struct tm_device *device, uint64_t first, page_set missing, uint64_t *words,
                uint8_t *content);
/* Read a page, wherever it is; *word is what the index said. The caller holds its I/O lock. */
int fetch_page(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Whether what was read from the file without a lock is what the page was when its word was this.
 */
bool fetch_is_right(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content);
/* Whether what was read has a checksum of the page's word; never for one without. */
bool fetch_is_intact(uint64_t word, const uint8_t *content);
