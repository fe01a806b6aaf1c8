/* Memory for records: size-classed slots in spans, backed by the host page by page.
 *
 * A span is 256 KiB of the pool file's address space, given to one size class (every multiple of 16 bytes is one) for as
 * long as it has a live slot. Its slots lie one behind the other without regard to page boundaries, and its pages are taken
 * from the host lowest first, so that a half-filled span costs only what lies in it. Which slots are live follows from the
 * index alone; all that is kept here is rebuilt on attach.
 *
 * Every span that is not full is on a list of its class: by how full it is when it has a free slot, and on the list of
 * those that can grow when only backing more of its pages makes one. So the fullest, in which slots are taken, and the
 * emptiest, which compaction empties, are found without a search.
 */
#ifndef TM_SLOTS_H
#define TM_SLOTS_H

#include <pthread.h>
#include <stddef.h>

#include "budget.h"
#include "layout.h"

#define TM_NO_SPAN UINT32_MAX
#define TM_CLASSES (TM_SLOT_MAX / TM_SLOT_ALIGN + 1)

/* Lists of a class's spans, then what spans say that are on none: those without room, and those held by a thread that
 * empties them or gives their memory back, in which nobody else takes a slot. */
enum { TM_GROWABLE = 0, TM_FULLNESS = 16, TM_LISTS = TM_FULLNESS + 1, TM_UNLISTED, TM_HELD };

struct tm_span {
    uint64_t backed;     /* one bit for each 4 KiB page that is allocated */
    uint64_t *live;      /* one bit for each slot in use; NULL: the span has no class */
    uint32_t prev, next; /* in its list, or in that of spans without a class */
    uint32_t size;       /* of its slots, in bytes */
    uint16_t n_live, n_free; /* a slot is free when it is not live and all its pages are backed */
    uint8_t list;
};

struct tm_class {
    pthread_mutex_t lock; /* guards this and all spans of the class */
    uint32_t lists;       /* one bit for each that is not empty */
    uint32_t first[TM_LISTS];
    uint64_t backed_pages;
    _Atomic uint64_t n_free; /* written under the lock */
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
 * what lies behind a span's last live slot. Claiming fails (false) for a location that cannot be. */
void tm_slots_backed(struct tm_slots *slots, uint64_t offset, uint64_t bytes);
bool tm_slots_claim(struct tm_slots *slots, uint32_t size, uint64_t location);
void tm_slots_finish(struct tm_slots *slots);

/* Bytes of slots of one size, or of all, that are backed and not in use. */
uint64_t tm_slots_free_of(const struct tm_slots *slots, uint32_t size);
uint64_t tm_slots_free_bytes(const struct tm_slots *slots);

/* Compaction of a class: the emptiest span's live records move into the fullest ones, one by one from the last, and the
 * pages that are dead then are given back. The caller owns the records, and begins with {.size, .source = TM_NO_SPAN,
 * .done = TM_NO_SPAN}. */
struct tm_compaction {
    uint32_t size;
    uint32_t source; /* the span that is being emptied */
    uint32_t slot;   /* the one that was tried last */
    uint32_t done;   /* spans that were tried and have live slots left, linked; they are held until the end */
    uint64_t given;  /* bytes given back */
};
struct tm_move {
    uint64_t from, to;
    uint64_t page; /* what the record at `from` says it is; it may be damaged, or still being written */
};
/* The next move worth making; `to` is allocated, and to be freed by who cannot make the move. False: the class is as dense
 * as it gets. No record is tried twice. */
bool tm_slots_next_move(struct tm_slots *slots, struct tm_compaction *compaction, struct tm_move *move);
/* Call this after the last move. */
void tm_slots_end_moves(struct tm_slots *slots, struct tm_compaction *compaction);

#endif
