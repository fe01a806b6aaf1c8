/* What the parts of the page path share; tmem.h is what others see. */
#ifndef TM_DEVICE_H
#define TM_DEVICE_H

#include <string.h>

#include "budget.h"
#include "codec.h"
#include "crc32c.h"
#include "file.h"
#include "locks.h"
#include "map.h"
#include "slots.h"
#include "statistics.h"
#include "tmem.h"

/* What lies where, by the generation that the index words say. Every change of a word changes it too, so that nobody has to
 * look through the index for it: that took 60 ms for a device of 64 GiB with every page in tmem. Between the two it may be
 * wrong by the pages that are changing. */
struct tm_ages {
    _Atomic uint64_t stored[TM_GENERATIONS]; /* bytes of slots */
    _Atomic uint64_t raw[TM_GENERATIONS];    /* of these, of incompressible pages */
    _Atomic uint64_t copied[TM_GENERATIONS]; /* of these, of pages that the file holds as well */
    _Atomic uint64_t filed[TM_GENERATIONS];  /* pages in the file */
};

/* What a demotion has looked for in vain: from this age on nothing is left that may go within this bound. What is old stays
 * so until the next generation begins, and what the file lacks until it is copied there. */
struct tm_vain {
    unsigned age; /* TM_GENERATIONS: none */
    uint64_t bound;
};

struct tm_device {
    char name[64];
    uint64_t size;
    struct tm_layout layout;
    bool lost_zero, durable;
    _Atomic uint64_t amiss; /* writes that have failed since all pages that are written through were last seen to be in the file */
    int pool_fd;
    uint8_t *base; /* the mapped pool file */
    uint64_t mapped;
    struct tm_counters *counters;
    const struct tm_control *control;
    struct tm_statistics *statistics;
    _Atomic uint8_t *states;  /* in the pool file; spelled out in the index on attach */
    _Atomic uint64_t *index;  /* in the pool file */
    pthread_mutex_t demote_lock; /* one demotion, cleaning or change of generation at a time */
    _Atomic unsigned generation; /* 1 to TM_ANCIENT; under demote_lock */
    struct tm_ages ages;
    uint64_t hand; /* where the next demotion begins to look; under demote_lock */
    struct tm_vain vain; /* under demote_lock */
    struct tm_budget budget;
    struct tm_slots slots;
    struct tm_file file;
    struct tm_map map;
    struct tm_locks locks;
};

static inline void tm_count(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline void tm_uncount(_Atomic uint64_t *counter, uint64_t n)
{
    atomic_fetch_sub_explicit(counter, n, memory_order_relaxed);
}

static inline const struct tm_record *tm_record_of(const struct tm_device *device, uint64_t word)
{
    return (const struct tm_record *)(device->slots.data + tm_location(word));
}

/* Copy a whole record into a slot, its page number as one word: the compactor may look at the slot meanwhile. */
static inline void tm_copy_record(struct tm_device *device, uint64_t location, const struct tm_record *from,
                                  uint32_t length)
{
    struct tm_record *to = (struct tm_record *)(device->slots.data + location);
    uint32_t page = atomic_load_explicit(&from->page, memory_order_relaxed);
    atomic_store_explicit(&to->page, page, memory_order_relaxed);
    memcpy((uint8_t *)to + sizeof page, (const uint8_t *)from + sizeof page, TM_RECORD_HEADER - sizeof page + length);
}

static inline bool tm_has_file(const struct tm_device *device) { return device->file.fd >= 0; }

/* Whether each write of the page reaches the file before it is acknowledged. Those of a device that is not durable are also
 * synced before. */
static inline bool tm_is_written_through(const struct tm_device *device, uint64_t page)
{
    return tm_has_file(device) && (device->durable || tm_is_probed(device->layout.pages, page));
}

/* Whether the page in tmem may be dropped. After a failed sync the file holds nothing for sure. */
static inline bool tm_is_clean(const struct tm_device *device, uint64_t word)
{
    return word & TM_WORD_CLEAN && !tm_file_is_doubtful(&device->file);
}

/* index.c */

/* The page's word. What it points at stays there only under the page's look lock. */
uint64_t tm_word(const struct tm_device *device, uint64_t page);
/* Store a new word under the page's change lock, then release what the old one held. Returns the old word, which is no more
 * than a memory by then. */
uint64_t tm_publish(struct tm_device *device, uint64_t page, uint64_t word);
/* The same where the page's content changes: a stored page is invalidated, what was used of it is freed. */
void tm_replace(struct tm_device *device, uint64_t page, uint64_t word);
/* Set bits of the page's word that do not move it, under its look lock. */
void tm_touch(struct tm_device *device, uint64_t page, uint64_t word);
/* The pages of a whole block, which may be the last. */
uint32_t tm_block_pages(const struct tm_device *device, uint64_t block);
/* Rebuild from the index; on failure *error says what is wrong. */
int tm_index_attach(struct tm_device *device, char *error, size_t error_size);
/* Take the change locks of pages, with the map saying that the file is not to be trusted there, unless they are written
 * through. On an error none is taken. No lock is held before. */
int tm_mark_and_lock(struct tm_device *device, uint64_t first, uint32_t n);

/* read.c */

/* The page's content, its change lock held, and its word; EAGAIN when it is in the file. */
int tm_read_memory(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* The page's content under its I/O lock, and the word under which it was read. */
int tm_read_ordered(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);
/* Whether a page that was read from the file is what one of the checksums of its word says. */
bool tm_is_intact(uint64_t word, const uint8_t *content);
/* Copy a stored page out without making it any younger; false when it is not stored, or damaged (which is counted). */
bool tm_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);

/* put.c */

/* Read a whole page into the pool: false when refused. Under the page's change lock. clean: the file holds the same. */
bool tm_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool clean);
/* Put a page that was read from the file under `word`, so that the next get finds it; false when it is not stored. Without
 * waiting: nothing happens where somebody is changing or overwriting the page, or has changed it. Measured: it adds 6.5 us to
 * a read from the file, which took a virtual disk 68 us (median). */
bool tm_promote(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word);

/* overwrite.c */

/* Give the page's word the mark of a write to the file, whether it still has it, and take it away from what did not reach the
 * file: under the page's change lock. */
void tm_start_writing(struct tm_device *device, uint64_t page);
bool tm_is_still_writing(struct tm_device *device, uint64_t page);
void tm_stop_writing(struct tm_device *device, uint64_t page);
/* The file holds what the page in tmem is: under its I/O and change locks. */
void tm_set_clean(struct tm_device *device, uint64_t page);
/* How many of the n neighbours from `page` on, at most TM_RUN_MAX, are written through like it, or not like it. */
uint32_t tm_alike_run(const struct tm_device *device, uint64_t page, uint64_t n);
/* Write n <= TM_RUN_MAX neighbours, all written through or none, to the file, under their I/O lock; NULL: zeros. Then they are
 * there, and with `put` in tmem too, but for one that somebody changes meanwhile: it is what he made it. On failure each is old,
 * new or EIO. content is aligned. With `changed` it is about one page of which a part is new, which was marked when the rest was
 * read, or is in the file: *changed says that somebody has changed it since, and that it must be read again. */
int tm_overwrite(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, bool put, bool *changed);

/* clean.c */

/* Clear the map's bits where nothing is in tmem that the file does not hold. Under demote_lock. */
int tm_clean(struct tm_device *device);
/* Make the file hold the pages that are written through as they are, durably, if any is amiss: a write that has failed, or was
 * killed, leaves either content there, and the map does not say so. */
int tm_mend(struct tm_device *device);
/* Set the map's bits of all pages that the file may lack. */
int tm_mark_dirty(struct tm_device *device);
/* After this, whoever held a page's change lock when it began has let go of it. */
void tm_wait_for_changes(struct tm_device *device);

/* compact.c */

/* Whether so much of the pool is free slots that a put which finds no memory is worth compacting for. */
bool tm_is_wasteful(const struct tm_device *device);
/* Let the host have memory back that free slots of any class take, so that a slot that was refused can be had: false when
 * there is nothing to be gained. It waits for no page, so locks of pages may be held. */
bool tm_reclaim(struct tm_device *device);

/* heat.c */

/* Go on with the generation that was current when the pool was last served. */
void tm_heat_init(struct tm_device *device);

/* What is known of a generation by now; a sum that is being changed may be below 0 for a moment, which is 0. */
static inline uint64_t tm_known(const _Atomic uint64_t *sum)
{
    uint64_t now = atomic_load_explicit(sum, memory_order_relaxed);
    return (int64_t)now < 0 ? 0 : now;
}

/* The generation of pages that are this old in generation `now`; ancient ones have 0. */
static inline unsigned tm_generation_of_age(unsigned now, unsigned age)
{
    return age == TM_ANCIENT ? 0 : now > age ? now - age : now + TM_ANCIENT - age;
}

/* How many generations ago the page was last used: 0 to TM_ANCIENT. */
static inline unsigned tm_age_of(struct tm_device *device, uint64_t word)
{
    unsigned now = atomic_load_explicit(&device->generation, memory_order_relaxed), then = tm_generation(word);
    return then ? (now + TM_ANCIENT - then) % TM_ANCIENT : TM_ANCIENT;
}

#endif
