/* SPDX-License-Identifier: BSD-3-Clause */
/* One page in tmem: put, with the page lock held by the caller; get, which takes the entry lock. */
#pragma once

#include "index.h"

/* Read a whole page: 0, EAGAIN when it is in the file, or EIO. *word: what the index said. */
int page_get(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Copy a page out without making it younger; false when it is not in tmem, or damaged (counted). */
bool page_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Whether that is what the page is, and it is not in the file. */
bool page_holds(struct tm_device *device, uint64_t page, const uint8_t *content);

/* Put a page whose content changes; false: refused. clean: the file holds the same. */
bool page_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean);
/* Encode a page into a slot: the word for it, which is not in the index yet; 0: refused. */
uint64_t page_store(struct tm_device *device, uint64_t page, const uint8_t *content);
/* Put a page whose whole record is there already; false: refused. */
bool page_put_record(struct tm_device *device, uint64_t page, const struct record *record);
/* Whether a page is all zeros. */
bool page_is_zero(const uint8_t *content);
