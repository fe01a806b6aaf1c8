/* Page locks. Every page has two, shared with the pages that fall into the same stripe:
 *
 * change: held by whoever changes the page, over its file I/O too, so that all changes of a page are ordered. Taken for
 *         runs, always in the order of the stripes.
 * look:   held to look at the page's index word and what it points at, and to store a new word; never over I/O. A reader
 *         needs no more, so nothing that is written to the file delays it, and what it looks at is not reused meanwhile.
 *
 * Order: clean_lock, change, index_lock, the map's lock or look, then those of the slots. */
#ifndef TM_LOCKS_H
#define TM_LOCKS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum { TM_STRIPES = 1024 }; /* more than the pages of the longest run that is locked */

struct tm_stripe {
    pthread_mutex_t change, look;
};

struct tm_locks {
    struct tm_stripe stripes[TM_STRIPES];
};

static inline struct tm_stripe *tm_stripe(struct tm_locks *locks, uint64_t page)
{
    return &locks->stripes[page % TM_STRIPES];
}

static inline void tm_look(struct tm_locks *locks, uint64_t page) { pthread_mutex_lock(&tm_stripe(locks, page)->look); }
static inline void tm_unlook(struct tm_locks *locks, uint64_t page)
{
    pthread_mutex_unlock(&tm_stripe(locks, page)->look);
}

/* Lock one page for change if nobody holds its lock. */
static inline bool tm_try_lock(struct tm_locks *locks, uint64_t page)
{
    return pthread_mutex_trylock(&tm_stripe(locks, page)->change) == 0;
}

/* Lock n < TM_STRIPES pages from `first` for change; a run that wraps round takes its low stripes first. */
static inline void tm_lock_run(struct tm_locks *locks, uint64_t first, uint32_t n)
{
    uint32_t start = (uint32_t)(first % TM_STRIPES);
    uint32_t wrapped = start + n > TM_STRIPES ? start + n - TM_STRIPES : 0;
    for (uint32_t i = 0; i < wrapped; i++)
        pthread_mutex_lock(&locks->stripes[i].change);
    for (uint32_t i = start; i < start + n - wrapped; i++)
        pthread_mutex_lock(&locks->stripes[i].change);
}

static inline void tm_unlock_run(struct tm_locks *locks, uint64_t first, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        pthread_mutex_unlock(&tm_stripe(locks, first + i)->change);
}

#endif
