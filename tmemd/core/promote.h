/* Pages come back from the file into tmem. It waits for nothing: where somebody changes a page it
 * stays in the file. */
#pragma once

#include "fetch.h"

/* Put a page that was read from the file under `word`; false when it is not stored. */
bool promote_page(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word);
/* Put those of n pages again that were just read from the file, under these words, and are in use,
 * where there is room to spare. */
void promote_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
                 const uint8_t *content);
