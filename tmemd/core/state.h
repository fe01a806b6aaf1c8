/* SPDX-License-Identifier: BSD-3-Clause */
/* The device that all modules above work on. The header of each part says which lock guards it. */
#pragma once

#include "ages.h"
#include "ahead.h"
#include "bitmap.h"
#include "budget.h"
#include "fence.h"
#include "file.h"
#include "locks.h"
#include "slots.h"
#include "staging.h"
#include "statistics.h"
#include "tmem.h"
#include "trend.h"
#include "usage.h"
#include "word.h"

/* From this age on nothing is left that may be demoted within this bound on writes; valid until the
 * next generation. */
struct backoff {
    unsigned age; /* TM_GENERATIONS: none */
    uint64_t bound;
};

/* When the generations of an ephemeral pool ended, which is not every five seconds. */
struct turns {
    uint64_t ticks, ended[TM_GENERATIONS]; /* of five seconds; guarded by demote_lock */
    _Atomic uint8_t age[TM_GENERATIONS];   /* of each generation, in ticks, up to TM_ANCIENT */
};

/* Where a write goes first. While it changes pages go to the file first, but it may lack others,
 * and the bitmap is kept. */
enum state_mode { STATE_WRITE_BACK, STATE_CHANGING, STATE_DURABLE };

/* What is fetched ahead (prefetch.c). */
struct prefetch {
    enum tm_prefetch mode;
    struct ahead ahead;
    _Atomic uint64_t recycled; /* hits until what was used once was last let go of */
    pthread_mutex_t lock;      /* of all that follows; who finds it taken learns nothing */
    struct trend trend;
    uint64_t misses;
    uint64_t judged_reads, judged_ns; /* from the file until it was last judged what they cost */
};

/* What the store is to be told of later (dead.c). */
struct dead {
    _Atomic uint64_t *bits; /* one for each page; NULL: it has no use for that */
    _Atomic uint64_t count;
    uint64_t next; /* where telling goes on; its caller's */
};

struct tm_device {
    char name[64];
    uint64_t size;
    struct tm_layout layout;
    bool lost_zero, ephemeral;
    _Atomic uint8_t mode; /* enum state_mode; changes under demote_lock (handover.c) */
    int pool_fd;
    uint8_t *base; /* the mapped pool file, of `mapped` bytes */
    uint64_t mapped;
    struct tm_counters *counters;
    const struct tm_control *control;
    struct tm_statistics *statistics;
    _Atomic uint8_t *states; /* of blocks; only attaching looks at them */
    _Atomic uint64_t *index; /* the words, each written under its page's entry lock */
    _Atomic uint64_t stale;  /* failed writes since the file was last known to hold all pages that
                                are written through */
    pthread_mutex_t demote_lock; /* one demotion, cleaning or change of generation at a time; guards
                                    `hand` and `backoff` */
    _Atomic unsigned generation; /* 1 to TM_ANCIENT; changes under demote_lock */
    uint64_t hand;               /* the block where the next demotion begins to look */
    struct backoff backoff;
    struct turns turns;
    struct usage usage;
    _Atomic uint32_t versions; /* of pages that are in the file alone, if it is ephemeral */
    struct ages ages;
    struct fence fence;
    struct budget budget;
    struct slots slots;
    struct file file;
    struct bitmap bitmap;
    struct locks locks;
    struct staging staging;
    struct prefetch prefetch;
    struct dead dead;
};

static inline bool state_has_file(const struct tm_device *device) { return device->file.store; }

static inline unsigned state_generation(const struct tm_device *device)
{
    return atomic_load_explicit(&device->generation, memory_order_relaxed);
}

/* How long ago pages of a generation were last used, in the units of the statistics. */
static inline unsigned state_age_of(const struct tm_device *device, unsigned now,
                                    unsigned generation)
{
    return device->ephemeral
               ? atomic_load_explicit(&device->turns.age[generation], memory_order_relaxed)
               : ages_of(now, word_with_generation(0, generation));
}

static inline unsigned state_age(const struct tm_device *device, uint64_t word)
{
    return state_age_of(device, state_generation(device), word_generation(word));
}

/* The word of a page that is in the file alone. That of an ephemeral pool bears no checksum, for
 * whatever the file holds is right, but a version: no two are the same, so that what was read
 * without a lock is known to be old. */
static inline uint64_t state_file_word(struct tm_device *device, uint32_t crc, unsigned generation)
{
    if (!device->ephemeral)
        return word_of_file(crc, generation);
    uint32_t version = atomic_fetch_add_explicit(&device->versions, 1, memory_order_relaxed);
    return word_of_file(version, generation) | TM_WORD_UNVERIFIED;
}

/* Whether libblkid (util-linux 2.38; strace of blkid -p) reads the page when it looks for
 * signatures: half a MiB at either end, and four places more. It gives up at the first error, and
 * swapon asks it: these pages are never lost. */
static inline bool state_is_read_by_blkid(const struct tm_device *device, uint64_t page)
{
    uint64_t pages = device->layout.pages;
    return page <= 128 || pages - page <= 128 || page == 256 || page == 512 || page == 1024 ||
           pages - page == 386;
}

static inline enum state_mode state_mode(const struct tm_device *device)
{
    return (enum state_mode)atomic_load(&device->mode);
}

/* Whether a FLUSH syncs the file, and the bitmap is not kept. */
static inline bool state_is_durable(const struct tm_device *device)
{
    return state_mode(device) == STATE_DURABLE;
}

/* Whether blkid reads any of n pages, and whether it reads all. */
static inline bool state_any_by_blkid(const struct tm_device *device, uint64_t first, uint32_t n)
{
    for (uint64_t page = first; page < first + n; page++)
        if (state_is_read_by_blkid(device, page))
            return true;
    return false;
}
static inline bool state_all_by_blkid(const struct tm_device *device, uint64_t first, uint32_t n)
{
    for (uint64_t page = first; page < first + n; page++)
        if (!state_is_read_by_blkid(device, page))
            return false;
    return true;
}

/* Whether each write of any of n pages, or of one, reaches the file before it is acknowledged.
 * Unless it is under a page lock this may be another thing a moment later. */
static inline bool state_any_written_through(const struct tm_device *device, uint64_t first,
                                             uint32_t n)
{
    return state_has_file(device) &&
           (state_mode(device) != STATE_WRITE_BACK || state_any_by_blkid(device, first, n));
}
static inline bool state_is_written_through(const struct tm_device *device, uint64_t page)
{
    return state_any_written_through(device, page, 1);
}

/* How many of n neighbours, at most TM_RUN_MAX, are written through, or not, as `page` is. */
static inline uint32_t state_alike_run(const struct tm_device *device, uint64_t page, uint64_t n)
{
    bool through = state_is_written_through(device, page);
    uint32_t run = 1;
    while (run < n && run < TM_RUN_MAX && state_is_written_through(device, page + run) == through)
        run++;
    return run;
}

/* Whether the page in tmem may be dropped. After a failed sync the file holds nothing for sure,
 * but whatever it holds is right if the pool is ephemeral. */
static inline bool state_is_clean(const struct tm_device *device, uint64_t word)
{
    return word & TM_WORD_CLEAN && (device->ephemeral || !file_is_doubtful(&device->file));
}

/* Whether only the file tells what a page is: what an ephemeral pool says may not be in it. */
static inline bool state_is_bypassed(const struct tm_device *device)
{
    return device->ephemeral && file_is_doubtful(&device->file);
}

/* Whether the file holds the page. A lost page is not in it: only the bitmap records that. */
static inline bool state_is_in_file(const struct tm_device *device, uint64_t word)
{
    return word == TM_NOWHERE || (word_kind(word) == TM_FILE && !word_is_in_doubt(word)) ||
           (word_kind(word) == TM_TMEM && state_is_clean(device, word));
}

/* Whether the page is written through, and the file may hold something else. */
static inline bool state_is_stale(const struct tm_device *device, uint64_t page, uint64_t word)
{
    return state_is_written_through(device, page) &&
           (word_kind(word) == TM_ZERO || (word_kind(word) == TM_TMEM && !(word & TM_WORD_CLEAN)));
}
