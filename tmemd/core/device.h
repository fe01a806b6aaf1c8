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

/* Added to the block states that the pool file knows: the block's page of the index is in use. */
enum { TM_BLOCK_IN_INDEX = 255 };

/* What lies where, by the generation that the index words say. Every change of a word changes it too, so that nobody has to
 * look through the index for it: that took 60 ms for a device of 64 GiB with every page in tmem. Between the two it may be
 * wrong by the pages that are changing. */
struct tm_ages {
    _Atomic uint64_t stored[TM_GENERATIONS]; /* bytes of slots */
    _Atomic uint64_t raw[TM_GENERATIONS];    /* of these, of incompressible pages */
    _Atomic uint64_t copied[TM_GENERATIONS]; /* of these, of pages that the file holds as well */
    _Atomic uint64_t filed[TM_GENERATIONS];  /* pages in the file, of blocks that are in the index */
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
    int pool_fd;
    uint8_t *base; /* the mapped pool file */
    uint64_t mapped;
    struct tm_counters *counters;
    const struct tm_control *control;
    struct tm_statistics *statistics;
    _Atomic uint8_t *states;  /* in the pool file */
    _Atomic uint64_t *index;  /* in the pool file; a hole is never touched */
    _Atomic uint8_t *blocks;  /* enum tm_state, or TM_BLOCK_IN_INDEX: what `states` and the index's holes say, in one byte */
    pthread_mutex_t index_lock;
    _Atomic uint32_t reserve; /* pages allocated ahead for the index; changed under index_lock */
    pthread_mutex_t clean_lock; /* one flush, drain or demotion at a time */
    _Atomic unsigned generation; /* 1 to TM_ANCIENT; under clean_lock */
    struct tm_ages ages;
    uint64_t hand; /* where the next demotion begins to look; under clean_lock */
    struct tm_vain vain; /* under clean_lock */
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

/* Whether the block's page of the index is in use; whoever holds no lock of the block may be wrong a moment later. */
static inline bool tm_in_index(struct tm_device *device, uint64_t block)
{
    return atomic_load_explicit(&device->blocks[block], memory_order_acquire) == TM_BLOCK_IN_INDEX;
}

static inline bool tm_has_file(const struct tm_device *device) { return device->file.fd >= 0; }

/* Whether each write of the page reaches the file, durably, before it is acknowledged. */
static inline bool tm_is_written_through(const struct tm_device *device, uint64_t page)
{
    return tm_has_file(device) && tm_is_probed(device->layout.pages, page);
}

/* index.c */

/* The page's word, under its look lock. */
uint64_t tm_word(struct tm_device *device, uint64_t page);
/* The same for someone who does not hold it. */
uint64_t tm_peek(struct tm_device *device, uint64_t page);
/* Copy a block's words as they are now, each by itself; false when the block has no page of the index in use. */
bool tm_copy_words(struct tm_device *device, uint64_t block, uint64_t *words);
/* Store a new word under the page's change lock, then release what the old one held. The block is in the index. Returns
 * the old word, which is no more than a memory by then. */
uint64_t tm_publish(struct tm_device *device, uint64_t page, uint64_t word);
/* The same where the page's content changes: a stored page is invalidated, what was used of it is freed. */
void tm_replace(struct tm_device *device, uint64_t page, uint64_t word);
/* Set bits of the page's word that do not move it, under its look lock. */
void tm_touch(struct tm_device *device, uint64_t page, uint64_t word);
/* Take the change locks of n <= TM_RUN_MAX pages whose blocks are in use in the index, bringing them into use where they
 * are not. No lock is held: it may demote to make room. On an error none is taken. */
int tm_lock_in_index(struct tm_device *device, uint64_t first, uint32_t n);
/* Bring the index's reserve to what it should be, within the target; and how many pages it is short of that. */
void tm_reserve_fill(struct tm_device *device);
uint32_t tm_reserve_missing(struct tm_device *device);
/* All pages of a block become zeros, at the price of no memory. Takes the locks it needs. */
int tm_zero_block(struct tm_device *device, uint64_t block);
/* Before the page is overwritten in the file, under its change lock: the index no longer vouches for what is there. Returns
 * what its word was. */
uint64_t tm_begin_overwriting(struct tm_device *device, uint64_t page);
/* The pages of a whole block, which may be the last. */
uint32_t tm_block_pages(const struct tm_device *device, uint64_t block);
/* Whether some page of the block is written through. */
bool tm_has_written_through(const struct tm_device *device, uint64_t block);
/* Rebuild from the index; on failure *error says what is wrong. */
int tm_index_attach(struct tm_device *device, char *error, size_t error_size);

/* read.c */

/* The page's content now, for someone who holds its change lock. */
int tm_read_locked(struct tm_device *device, uint64_t page, uint8_t *content);
/* Copy a stored page out without making it any younger; false when it is not stored, or damaged (which is counted). */
bool tm_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word);

/* write.c */

/* Read a whole page into the pool: false when refused. Under the page's change lock. filed: the file holds the same. */
bool tm_put(struct tm_device *device, uint64_t page, const uint8_t *content, bool filed);
/* Put a page that was read from the file under `word`, whose checksum it has, so that the next get finds it. Without waiting:
 * nothing happens where there is no room to spare, or somebody is changing the page, or has changed it. Measured: it adds
 * 6.5 us to a read from the file, which took a virtual disk 68 us (median). */
void tm_promote(struct tm_device *device, uint64_t page, const uint8_t *content, uint64_t word);

/* clean.c */

/* Make the file hold everything and clear the map's bits. Under clean_lock. */
int tm_clean(struct tm_device *device);
/* After this, whoever was changing a page when it began has published what he had. */
void tm_wait_for_changes(struct tm_device *device);

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
