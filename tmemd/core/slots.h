/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory for records: size-classed slots in spans, allocated by the host page by page.
 *
 * A span is 256 KiB of the pool file's address space, given to one size class (every multiple of 16
 * bytes is one) for as long as it has a live slot. Its slots lie one behind the other without
 * regard to page boundaries, and its pages are taken from the host lowest first, so that a
 * half-filled span costs only what lies in it. Which slots are live follows from the index alone;
 * all that is kept here is rebuilt on attach.
 *
 * Every span that is not full is on a list of its class: by how full it is when it has a free slot,
 * and on the list of those that can grow when only backing more of its pages makes one. So the
 * fullest, in which slots are taken, and the emptiest, which compaction empties, are found without
 * a search.
 */
#pragma once

#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "budget.h"
#include "codec.h"
#include "span.h"

#define TM_NO_SPAN UINT32_MAX

/* Lists of a class's spans, then what spans say that are on none: those without room, and those
 * held by a thread that empties them or gives their memory back, in which nobody else takes a slot.
 */
enum {
    SPAN_GROWABLE = 0,
    SPAN_FULLNESS = 16,
    SPAN_LISTS = SPAN_FULLNESS + 1,
    SPAN_UNLISTED,
    SPAN_ISOLATED
};

struct size_class {
    pthread_mutex_t lock; /* guards this and all spans of the class */
    uint32_t lists;       /* one bit for each that is not empty */
    uint32_t first[SPAN_LISTS];
    uint64_t allocated_pages;
    _Atomic uint64_t n_free; /* written under the lock */
};

struct slots {
    uint64_t data_offset;
    uint8_t *data;
    struct budget *budget;
    struct span *spans;
    uint32_t n_spans;
    pthread_mutex_t lock;   /* guards the two below; taken inside a class's lock */
    uint32_t free_spans;    /* first of the spans that had a class once */
    uint32_t n_initialized; /* spans from here on never had one */
    struct size_class classes[TM_SIZE_CLASSES];
};

int slots_init(struct slots *slots, uint8_t *data, const struct tm_layout *layout,
               struct budget *budget);
void slots_destroy(struct slots *slots);

/* The record in a slot. */
static inline struct record *slots_record(const struct slots *slots, uint64_t location)
{
    return (struct record *)(slots->data + location);
}

/* Copy a record into a slot; its page number as one word, for the compactor may look at it. */
static inline void slots_fill(const struct slots *slots, uint64_t location,
                              const struct record *from, uint32_t length)
{
    struct record *to = slots_record(slots, location);
    uint32_t page = atomic_load_explicit(&from->page, memory_order_relaxed);
    atomic_store_explicit(&to->page, page, memory_order_relaxed);
    memcpy((uint8_t *)to + sizeof page, (const uint8_t *)from + sizeof page,
           TM_RECORD_HEADER - sizeof page + length);
}

/* A free slot of `size` bytes: *location is its offset in the data area. False: refused. These two
 * take the class's lock; slots_alloc may call fallocate under it. */
bool slots_alloc(struct slots *slots, uint32_t size, uint64_t *location);
void slots_free(struct slots *slots, uint32_t size, uint64_t location);

/* Attach, one thread and no lock, in this order: mark what the file has allocated, claim every live
 * record's slot, then finish, which gives back what lies behind a span's last live slot. Claiming
 * fails (false) for a location that cannot be. */
void slots_adopt_allocated(struct slots *slots, uint64_t offset, uint64_t bytes);
bool slots_claim(struct slots *slots, uint32_t size, uint64_t location);
void slots_finish(struct slots *slots);

/* Bytes of slots of one size, or of all, that are allocated and not in use. */
uint64_t slots_free_of(const struct slots *slots, uint32_t size);
uint64_t slots_free_bytes(const struct slots *slots);

/* Compaction of a class: the emptiest span's live records move into the fullest ones, one by one
 * from the last, and the pages that are dead then are given back. The caller owns the records, and
 * begins with {.size, .source = TM_NO_SPAN, .done = TM_NO_SPAN}. */
struct compaction {
    uint32_t size;
    uint32_t source;  /* the span that is being emptied */
    uint32_t slot;    /* the one that was tried last */
    uint32_t done;    /* spans that were tried and have live slots left, linked; they are held until
                         the end */
    uint64_t punched; /* bytes given back */
};
struct slots_move {
    uint64_t from, to;
    uint64_t
        page; /* what the record at `from` says it is; it may be damaged, or still being written */
};
/* The next move worth making; `to` is allocated, and to be freed by who cannot make the move.
 * False: the class is as dense as it gets. No record is tried twice. */
bool slots_next_move(struct slots *slots, struct compaction *compaction, struct slots_move *move);
/* Call this after the last move. */
void slots_end_moves(struct slots *slots, struct compaction *compaction);
