/* One page in tmem: put and get. A put takes the page's page lock from its caller; a get takes the
 * entry lock by itself. */
#pragma once

#include "index.h"

/* Read a whole page: 0, EAGAIN when it is in the file, or EIO. *word is what the index said of it.
 */
int page_get(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Copy a stored page out without making it any younger; false when it is not stored, or damaged
 * (which is counted). */
bool page_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);

/* Put a page whose content changes; false: refused. clean: the file holds the same. Under its page
 * lock. */
bool page_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean);
/* Encode a page into a slot of its own: the word for it, or 0 when it is refused. Nothing is said
 * of it in the index yet. */
uint64_t page_store(struct tm_device *device, uint64_t page, const uint8_t *content);
/* Whether a page is all zeros. */
bool page_is_zero(const uint8_t *content);
