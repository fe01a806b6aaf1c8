/* Memory for records: size-classed slots in spans, backed by the host page by page.
 *
 * A span is 256 KiB of the pool file's address space, given to one size class (every multiple of 16 bytes is one). Its
 * slots lie one behind the other without regard to page boundaries, and its pages are taken from the host lowest first,
 * so that a half-filled span costs only what lies in it. Which slots are in use follows from the index alone; all that is
 * kept here is rebuilt on attach.
 */
#ifndef TM_SLOTS_H
#define TM_SLOTS_H

#include <pthread.h>
#include <stddef.h>

#include "budget.h"
#include "layout.h"

#define TM_NO_SPAN UINT32_MAX
#define TM_CLASSES (TM_SLOT_MAX / TM_SLOT_ALIGN + 1)

struct tm_span {
    uint64_t backed;     /* one bit for each 4 KiB page that is allocated */
    uint64_t *free;      /* one bit for each slot that is backed and not in use; NULL: the span has no class */
    uint32_t prev, next; /* in its class's list of spans with free slots, or in the list of spans without a class */
    uint32_t size;       /* of its slots, in bytes */
    uint16_t n_free, n_live;
    bool listed;
};

struct tm_class {
    pthread_mutex_t lock;   /* guards this and all spans of the class */
    uint32_t partial;       /* first span with free slots */
    uint32_t growing;       /* the span that takes more pages when no slot is free */
    uint64_t backed_pages;
    uint64_t n_free;
};

struct tm_slots {
    int pool_fd;
    uint64_t data_offset;
    uint8_t *data;
    struct tm_budget *budget;
    struct tm_span *spans;
    uint32_t n_spans;
    pthread_mutex_t lock; /* guards the two below; taken inside a class's lock */
    uint32_t unused;      /* first of the spans that had a class once */
    uint32_t fresh;       /* spans from here on never had one */
    struct tm_class classes[TM_CLASSES];
};

int tm_slots_init(struct tm_slots *slots, int pool_fd, uint8_t *data, const struct tm_layout *layout,
                  struct tm_budget *budget);
void tm_slots_destroy(struct tm_slots *slots);

/* A free slot of `size` bytes: *location is its offset in the data area. False: refused. */
bool tm_slot_alloc(struct tm_slots *slots, uint32_t size, uint64_t *location);
void tm_slot_free(struct tm_slots *slots, uint32_t size, uint64_t location);

/* Attach, in this order: mark what the file has allocated, claim every live record's slot, then finish, which gives back
 * all that no live slot touches. Claiming fails (false) for a location that cannot be. */
void tm_slots_backed(struct tm_slots *slots, uint64_t offset, uint64_t bytes);
bool tm_slots_claim(struct tm_slots *slots, uint32_t size, uint64_t location);
void tm_slots_finish(struct tm_slots *slots);

/* Bytes of slots that are backed and not in use. */
uint64_t tm_slots_free_bytes(struct tm_slots *slots);

/* Compaction moves a live record from the emptiest span of a class to a hole elsewhere; the caller owns the records. */
struct tm_move {
    uint64_t from, to;
    uint64_t page; /* what the record at `from` says it is; it may still be being written */
};
/* The next move worth making in the class of `size`; `to` is allocated. False: the class is as dense as it gets. */
bool tm_slots_next_move(struct tm_slots *slots, uint32_t size, struct tm_move *move);
/* Punch out the pages of a class that no live slot touches; returns bytes. */
uint64_t tm_slots_punch(struct tm_slots *slots, uint32_t size);

#endif
