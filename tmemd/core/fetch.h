/* Pages are read from the file, and checked. Runs are read without a lock: what was overwritten
 * meanwhile does not have the checksum that the index said, and is read again under its I/O lock.
 */
#pragma once

#include "page.h"

/* Read n <= TM_RUN_MAX neighbours that are in the file as `words` say. Of one that has changed
 * meanwhile the word is marked as being written: it is not what was read. */
int fetch_run(struct tm_device *device, uint64_t first, uint32_t n, uint64_t *words,
              uint8_t *content);
/* Read a page, wherever it is, under its I/O lock; *word is what the index said of it. */
int fetch_page(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Whether what was read has a checksum of the page's word; never for one without. */
bool fetch_is_intact(uint64_t word, const uint8_t *content);
