/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages are written to the file over what is there: spills, writes that go through, and zeros.
 *
 * Under the run's I/O lock, and one after the other:
 * 1. mark:  each word loses what it says of the file, and gets the mark of a write that is under
 * way (TM_WORD_WRITING). A page that is only in the file keeps, besides, what tells old and new
 * content apart.
 * 2. write: without any other lock. Readers find what they would find without it; whoever puts or
 * trims a page replaces its word, and with it the mark.
 * 3. complete:  words that still have the mark say what is in the file now. Where the write has
 * failed they say what they said before, or that the page is torn, where it is not found intact. */
#pragma once

#include "page.h"
#include "stretch.h"

struct overwrite {
    uint64_t first;
    uint32_t n;             /* at most TM_RUN_MAX */
    const uint8_t *content; /* aligned; NULL: zeros */
    bool put;               /* put them, besides */
    bool punch;             /* zeros: let go of the file's blocks */
    /* Those that puts have just left in tmem; the first that has changed since ends the run.
     * Afterwards they are clean. */
    page_set stored;
    /* Whether the page is still to be written, under its page lock; the first that is not ends the
     * run. NULL: all are. */
    bool (*is_wanted)(const struct tm_device *device, uint64_t page);
    uint32_t n_completed; /* afterwards n is how many were written, and this how many of them nobody
                        has changed meanwhile */
    uint64_t *words;      /* NULL, or room for what the words of those n become */
};

/* Write the pages and say so in the index: 0 or an errno. On failure each is old, new or EIO. The
 * first form takes the I/O lock, the other finds it taken. */
int overwrite_run(struct tm_device *device, struct overwrite *run);
int overwrite_locked(struct tm_device *device, struct overwrite *run);

/* Have the file hold the zeros that it lacks of some of the pages of [first, end), from the first
 * on; *n becomes of how many it does now: at least one. It takes their I/O lock. */
int overwrite_zeros(struct tm_device *device, uint64_t first, uint64_t end, uint32_t *n);

/* Set the bits of the bitmap, where it is kept, then take the page locks. On an error none is
 * taken. The caller holds no page lock. */
int overwrite_lock_pages(struct tm_device *device, uint64_t first, uint32_t n);
