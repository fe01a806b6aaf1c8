/* Page locks. Every page has two, shared with the pages that fall into the same stripe, and neither is held over file I/O:
 *
 * change: held by whoever changes the page. Taken for runs, always in the order of the stripes.
 * look:   held to look at the page's index word and what it points at, and to store a new word. A reader needs no more, so
 *         what it looks at is not reused meanwhile.
 *
 * I/O lock: of a range of pages, held over each write to the file, so that the writes of a page are ordered. A page of which
 *         the index says something about the file (that it is there, clean, or zeros in both) becomes so under its I/O lock.
 *         Pages change in tmem without it: a write to the file marks the words it is about (TM_WORD_WRITING), and says nothing
 *         of those that have lost the mark when it is done.
 *
 * Order: demote_lock, I/O, change, index_lock or look, then those of the slots. The map's lock is taken without change locks. */
#ifndef TM_LOCKS_H
#define TM_LOCKS_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum { TM_STRIPES = 1024 }; /* more than the pages of the longest run that is locked */

struct tm_stripe {
    pthread_mutex_t change, look;
};

/* A range of pages that is or waits to be locked for I/O; it lives on its holder's stack. */
struct tm_io {
    uint64_t first;
    uint32_t n;
    struct tm_io *next;
};

struct tm_locks {
    struct tm_stripe stripes[TM_STRIPES];
    pthread_mutex_t io_lock; /* guards the list: those who hold their range, and those who wait, as they came */
    pthread_cond_t io_released;
    struct tm_io *io;
};

void tm_locks_init(struct tm_locks *locks);
void tm_locks_destroy(struct tm_locks *locks);

/* Lock a range for I/O: after those that came earlier and overlap. */
void tm_io_lock(struct tm_locks *locks, struct tm_io *io);
void tm_io_unlock(struct tm_locks *locks, struct tm_io *io);

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
