/* SPDX-License-Identifier: BSD-3-Clause */
/* Locks of pages. Each page has two, shared with the pages that fall into the same stripe, and
 * neither is held over file I/O:
 *
 * page lock:  held by whoever changes the page. Taken for runs, always in the order of the stripes.
 * entry lock: held to look at the page's index word and what it points at, and to store a new word.
 * A reader needs no more, so what it looks at is not reused meanwhile.
 *
 * I/O lock:   of a range of pages, held over each write to the file, so that the writes of a page
 * are ordered. A page of which the index says something about the file (that it is there, clean, or
 * zeros in both) becomes so under its I/O lock. Pages change in tmem without it: a write to the
 * file marks the words it is about (TM_WORD_WRITING), and says nothing of those that have lost the
 * mark when it is done.
 *
 * Order: demote_lock, I/O, page, entry, then those of the slots. The bitmap's: alone. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum { TM_STRIPES = 1024 }; /* more than the pages of the longest run that is locked */

struct stripe {
    pthread_mutex_t page, entry;
};

/* A range of pages that is locked for I/O or waits to be; it lives on its holder's stack. */
struct io_range {
    uint64_t first;
    uint32_t n;
    struct io_range *next;
};

struct locks {
    struct stripe stripes[TM_STRIPES];
    pthread_mutex_t
        io_lock; /* guards the list: those who hold their range, and those who wait, as they came */
    pthread_cond_t io_released;
    struct io_range *io;
};

void locks_init(struct locks *locks);
void locks_destroy(struct locks *locks);
/* After this, whoever held a page lock when it began has let go of it. */
void locks_wait_for_pages(struct locks *locks);

/* Lock a range for I/O: after those that came earlier and overlap. */
void lock_io(struct locks *locks, struct io_range *io);
void unlock_io(struct locks *locks, struct io_range *io);

static inline struct stripe *lock_stripe(struct locks *locks, uint64_t page)
{
    return &locks->stripes[page % TM_STRIPES];
}

static inline void lock_entry(struct locks *locks, uint64_t page)
{
    pthread_mutex_lock(&lock_stripe(locks, page)->entry);
}
static inline void unlock_entry(struct locks *locks, uint64_t page)
{
    pthread_mutex_unlock(&lock_stripe(locks, page)->entry);
}

/* Take the page lock of one page if nobody holds it. */
static inline bool lock_try_page(struct locks *locks, uint64_t page)
{
    return pthread_mutex_trylock(&lock_stripe(locks, page)->page) == 0;
}

/* Take the page locks of n < TM_STRIPES neighbours; where they wrap round low stripes come first.
 */
static inline void lock_pages(struct locks *locks, uint64_t first, uint32_t n)
{
    uint32_t start = (uint32_t)(first % TM_STRIPES);
    uint32_t wrapped = start + n > TM_STRIPES ? start + n - TM_STRIPES : 0;
    for (uint32_t i = 0; i < wrapped; i++)
        pthread_mutex_lock(&locks->stripes[i].page);
    for (uint32_t i = start; i < start + n - wrapped; i++)
        pthread_mutex_lock(&locks->stripes[i].page);
}

static inline void unlock_pages(struct locks *locks, uint64_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        pthread_mutex_unlock(&lock_stripe(locks, first + i)->page);
}
