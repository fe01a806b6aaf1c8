/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "slots.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A class grows by this share of what it has and of what there is room for, between 1 and 16 pages:
 * small classes waste less than a page, large ones call fallocate once for about fifty records. */
enum { GROW_SHARE = 32, GROW_MAX = 16 };

static struct size_class *class_of(struct slots *slots, uint32_t n)
{
    return &slots->classes[n / TM_SLOT_ALIGN];
}

int slots_init(struct slots *slots, uint8_t *data, const struct tm_layout *layout,
               struct budget *budget)
{
    slots->data = data;
    slots->data_offset = layout->data_offset;
    slots->budget = budget;
    slots->n_spans = (uint32_t)(layout->data_bytes / TM_SPAN_BYTES);
    slots->free_spans = TM_NO_SPAN;
    slots->n_initialized = 0;
    pthread_mutex_init(&slots->lock, NULL);
    for (size_t i = 0; i < TM_SIZE_CLASSES; i++) {
        memset(slots->classes[i].first, 0xff, sizeof slots->classes[i].first);
        pthread_mutex_init(&slots->classes[i].lock, NULL);
    }
    slots->spans = mmap(NULL, slots->n_spans * sizeof *slots->spans, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return slots->spans == MAP_FAILED ? errno : 0;
}

void slots_destroy(struct slots *slots)
{
    if (!slots->spans || slots->spans == MAP_FAILED)
        return;
    for (uint32_t i = 0; i < slots->n_initialized; i++)
        free(slots->spans[i].live);
    munmap(slots->spans, slots->n_spans * sizeof *slots->spans);
    for (size_t i = 0; i < TM_SIZE_CLASSES; i++)
        pthread_mutex_destroy(&slots->classes[i].lock);
    pthread_mutex_destroy(&slots->lock);
}

static void move_to_list(struct slots *slots, struct size_class *class, uint32_t index,
                         uint8_t list)
{
    struct span *spans = slots->spans, *span = &spans[index];
    if (span->list < SPAN_LISTS) {
        *(span->prev != TM_NO_SPAN ? &spans[span->prev].next : &class->first[span->list]) =
            span->next;
        if (span->next != TM_NO_SPAN)
            spans[span->next].prev = span->prev;
        if (class->first[span->list] == TM_NO_SPAN)
            class->lists &= ~(1u << span->list);
    }
    span->list = list;
    if (list < SPAN_LISTS) {
        span->prev = TM_NO_SPAN;
        span->next = class->first[list];
        if (span->next != TM_NO_SPAN)
            spans[span->next].prev = index;
        class->first[list] = index;
        class->lists |= 1u << list;
    }
}

/* Put a span that nobody holds on the list where it belongs by now. */
static void list_span(struct slots *slots, struct size_class *class, uint32_t index)
{
    const struct span *span = &slots->spans[index];
    uint8_t list = SPAN_UNLISTED;
    if (span->n_free)
        list = (uint8_t)(1 + span->n_live * span->size / (TM_SPAN_BYTES / SPAN_FULLNESS));
    else if (span_growth(span))
        list = SPAN_GROWABLE;
    if (list != span->list && span->list != SPAN_ISOLATED)
        move_to_list(slots, class, index, list);
}

static void count_free(struct size_class *class, struct span *span, int n)
{
    uint64_t before = atomic_load_explicit(&class->n_free, memory_order_relaxed);
    span->n_free = (uint16_t)(span->n_free + n);
    atomic_store_explicit(&class->n_free, before + (uint64_t)n, memory_order_relaxed);
}

/* Back more pages of the span (lost: no more of these), and count which slots are free now. */
static void change_allocated(struct size_class *class, struct span *span, uint64_t gained,
                             uint64_t lost)
{
    span->allocated = (span->allocated | gained) & ~lost;
    class->allocated_pages +=
        (uint64_t)__builtin_popcountll(gained) - (uint64_t)__builtin_popcountll(lost);
    count_free(class, span, span_count_free(span) - span->n_free);
}

static bool assign_span(struct span *span, uint32_t size)
{
    span->live = calloc((span_slots(size) + 63) / 64, sizeof *span->live);
    span->size = size;
    span->n_free = span->n_live = 0;
    span->list = SPAN_UNLISTED;
    return span->live != NULL;
}

/* Let any class have the span, whose pages are not allocated. */
static void retire_span(struct slots *slots, uint32_t index)
{
    free(slots->spans[index].live);
    slots->spans[index].live = NULL;
    pthread_mutex_lock(&slots->lock);
    slots->spans[index].next = slots->free_spans;
    slots->free_spans = index;
    pthread_mutex_unlock(&slots->lock);
}

/* A span without a class, now of this one; TM_NO_SPAN when there is none. */
static uint32_t new_span(struct slots *slots, uint32_t size)
{
    pthread_mutex_lock(&slots->lock);
    uint32_t index = slots->free_spans;
    if (index != TM_NO_SPAN)
        slots->free_spans = slots->spans[index].next;
    else if (slots->n_initialized < slots->n_spans)
        index = slots->n_initialized++;
    pthread_mutex_unlock(&slots->lock);
    if (index == TM_NO_SPAN || assign_span(&slots->spans[index], size))
        return index;
    retire_span(slots, index);
    return TM_NO_SPAN;
}

static uint64_t run_offset(const struct slots *slots, uint32_t index, uint64_t run)
{
    return slots->data_offset + (uint64_t)index * TM_SPAN_BYTES +
           (uint64_t)__builtin_ctzll(run) * TM_PAGE;
}

static uint64_t run_bytes(uint64_t run) { return (uint64_t)__builtin_popcountll(run) * TM_PAGE; }

/* Punch pages of a span out, each run of neighbours by one call. */
static void punch(struct slots *slots, uint32_t index, uint64_t pages)
{
    while (pages) {
        uint64_t run = span_first_run(pages, TM_SPAN_PAGES);
        budget_free(slots->budget, run_offset(slots, index, run), run_bytes(run));
        pages &= ~run;
    }
}

/* Give back the pages of a held span that no live slot touches; returns bytes. The class's lock is
 * not held over the punching: nobody takes a slot of what is held, or grows it. */
static uint64_t punch_unused(struct slots *slots, struct size_class *class, uint32_t index)
{
    uint64_t punched = 0, dead;
    while ((dead = span_unused_pages(&slots->spans[index]))) {
        change_allocated(class, &slots->spans[index], 0, dead);
        pthread_mutex_unlock(&class->lock);
        punch(slots, index, dead);
        pthread_mutex_lock(&class->lock);
        punched += run_bytes(dead);
    }
    return punched;
}

/* Give back what of a held span no live slot touches, and hold it no longer. Returns bytes. */
static uint64_t put_back(struct slots *slots, struct size_class *class, uint32_t index)
{
    uint64_t punched = punch_unused(slots, class, index);
    slots->spans[index].list = SPAN_UNLISTED;
    if (slots->spans[index].n_live)
        list_span(slots, class, index);
    else
        retire_span(slots, index);
    return punched;
}

/* Back pages of a span; false: refused. */
static bool back(struct slots *slots, uint32_t index, uint64_t run)
{
    return budget_allocate(slots->budget, run_offset(slots, index, run), run_bytes(run),
                           budget_target(slots->budget)) == 0;
}

/* Back more pages of a span, lowest first; fewer near the target: other classes need them. */
static bool grow_span(struct slots *slots, struct size_class *class, uint32_t index)
{
    uint64_t used = atomic_load_explicit(&slots->budget->counters->used, memory_order_relaxed);
    uint64_t target = budget_target(slots->budget),
             room = target > used ? (target - used) / TM_PAGE : 0;
    uint64_t share = (room < class->allocated_pages ? room : class->allocated_pages) / GROW_SHARE;
    uint32_t most = share < 1 ? 1 : share > GROW_MAX ? GROW_MAX : (uint32_t)share;
    uint64_t run = span_first_run(span_growth(&slots->spans[index]), most);
    if (!back(slots, index, run) && !back(slots, index, run &= -run))
        return false;
    change_allocated(class, &slots->spans[index], run, 0);
    return true;
}

/* Make a slot of a span free, or give back what was allocated for it. Returns it, or TM_NO_SPAN. */
static uint32_t grow(struct slots *slots, struct size_class *class, uint32_t index)
{
    if (index == TM_NO_SPAN)
        return TM_NO_SPAN;
    move_to_list(slots, class, index, SPAN_ISOLATED);
    while (!slots->spans[index].n_free) /* one page may hold less than a slot */
        if (!grow_span(slots, class, index)) {
            put_back(slots, class, index);
            return TM_NO_SPAN;
        }
    slots->spans[index].list = SPAN_UNLISTED;
    list_span(slots, class, index);
    return index;
}

/* The fullest of the spans with free slots. */
static uint32_t fullest(const struct size_class *class)
{
    uint32_t lists = class->lists & ~(1u << SPAN_GROWABLE);
    return lists ? class->first[31 - __builtin_clz(lists)] : TM_NO_SPAN;
}

static uint64_t take_slot(struct slots *slots, struct size_class *class, uint32_t index)
{
    struct span *span = &slots->spans[index];
    uint32_t slot = span_lowest_free(span);
    span_flip(span, slot);
    span->n_live++;
    count_free(class, span, -1);
    list_span(slots, class, index);
    return (uint64_t)index * TM_SPAN_BYTES + (uint64_t)slot * span->size;
}

bool slots_alloc(struct slots *slots, uint32_t size, uint64_t *location)
{
    struct size_class *class = class_of(slots, size);
    pthread_mutex_lock(&class->lock);
    uint32_t index = fullest(class);
    if (index == TM_NO_SPAN) {
        index = class->first[SPAN_GROWABLE];
        index = grow(slots, class, index != TM_NO_SPAN ? index : new_span(slots, size));
    }
    if (index != TM_NO_SPAN)
        *location = take_slot(slots, class, index);
    pthread_mutex_unlock(&class->lock);
    return index != TM_NO_SPAN;
}

void slots_free(struct slots *slots, uint32_t size, uint64_t location)
{
    struct size_class *class = class_of(slots, size);
    uint32_t index = (uint32_t)(location / TM_SPAN_BYTES);
    struct span *span = &slots->spans[index];
    pthread_mutex_lock(&class->lock);
    span_flip(span, (uint32_t)(location % TM_SPAN_BYTES) / size);
    span->n_live--;
    count_free(class, span, 1);
    /* An empty span goes when others have free slots: else it would be taken from the host again by
     * the next put, which took 10 us more where a page was put and trimmed in turns. */
    if (!span->n_live && span->list != SPAN_ISOLATED &&
        atomic_load(&class->n_free) > span->n_free) {
        move_to_list(slots, class, index, SPAN_ISOLATED);
        put_back(slots, class, index);
    } else {
        list_span(slots, class, index);
    }
    pthread_mutex_unlock(&class->lock);
}

void slots_adopt_allocated(struct slots *slots, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes; at += TM_PAGE) {
        uint32_t index = (uint32_t)(at / TM_SPAN_BYTES);
        slots->spans[index].allocated |= UINT64_C(1) << at % TM_SPAN_BYTES / TM_PAGE;
        if (index >= slots->n_initialized)
            slots->n_initialized = index + 1;
    }
}

bool slots_claim(struct slots *slots, uint32_t size, uint64_t location)
{
    uint32_t index = (uint32_t)(location / TM_SPAN_BYTES),
             at = (uint32_t)(location % TM_SPAN_BYTES);
    if (index >= slots->n_initialized || at % size || at / size >= span_slots(size))
        return false;
    struct span *span = &slots->spans[index];
    if (!span->live && !assign_span(span, size))
        return false;
    uint32_t slot = at / size;
    if (span->size != size || span_is_live(span, slot) || !span_is_backed(span, slot))
        return false;
    span_flip(span, slot);
    span->n_live++;
    return true;
}

void slots_finish(struct slots *slots)
{
    for (uint32_t index = slots->n_initialized; index-- > 0;) {
        struct span *span = &slots->spans[index];
        uint32_t size = span->size, last = span->live ? span_slots(size) : 0;
        bool any = span->live && span_next_live_below(span, &last);
        uint64_t kept = any ? span->allocated & span_lowest(span_pages_for(last + 1, size)) : 0;
        punch(slots, index, span->allocated & ~kept);
        span->allocated = kept;
        if (span->live) {
            change_allocated(class_of(slots, size), span, kept, 0);
            list_span(slots, class_of(slots, size), index);
        } else {
            retire_span(slots, index);
        }
    }
}

uint64_t slots_free_of(const struct slots *slots, uint32_t size)
{
    return atomic_load_explicit(&slots->classes[size / TM_SLOT_ALIGN].n_free,
                                memory_order_relaxed) *
           size;
}

uint64_t slots_free_bytes(const struct slots *slots)
{
    uint64_t bytes = 0;
    for (uint32_t size = TM_SLOT_MIN; size <= TM_SLOT_MAX; size += TM_SLOT_ALIGN)
        bytes += slots_free_of(slots, size);
    return bytes;
}

/* The span to empty next; TM_NO_SPAN when that would gain nothing. */
static uint32_t emptiest(const struct slots *slots, const struct size_class *class)
{
    if (!class->lists)
        return TM_NO_SPAN;
    const struct span *spans = slots->spans;
    uint32_t fullness = class->lists & ~(1u << SPAN_GROWABLE),
             growable = class->first[SPAN_GROWABLE];
    uint32_t index = fullness ? class->first[__builtin_ctz(fullness)] : growable;
    if (growable != TM_NO_SPAN && spans[growable].n_live < spans[index].n_live)
        index = growable;
    bool alone = !(class->lists & (class->lists - 1)) && spans[index].next == TM_NO_SPAN;
    bool dense = (int)span_pages_for(spans[index].n_live, spans[index].size) >=
                 __builtin_popcountll(spans[index].allocated);
    return alone && dense ? TM_NO_SPAN : index;
}

/* The slot for a record: in the fullest span, in one that grows, or further down in the same. */
static bool find_move(struct slots *slots, struct size_class *class,
                      const struct compaction *compaction, struct slots_move *move)
{
    const struct span *source = &slots->spans[compaction->source];
    uint32_t index = fullest(class);
    if (index == TM_NO_SPAN)
        index = grow(slots, class, class->first[SPAN_GROWABLE]);
    if (index == TM_NO_SPAN && source->n_free && span_lowest_free(source) < compaction->slot)
        index = compaction->source;
    if (index == TM_NO_SPAN)
        return false;
    move->from = (uint64_t)compaction->source * TM_SPAN_BYTES +
                 (uint64_t)compaction->slot * compaction->size;
    move->to = take_slot(slots, class, index);
    move->page = atomic_load_explicit(&slots_record(slots, move->from)->page, memory_order_relaxed);
    return true;
}

/* Done with the source: what is left in it cannot be moved, or has nowhere to go. */
static void leave_source(struct slots *slots, struct size_class *class,
                         struct compaction *compaction)
{
    uint32_t index = compaction->source;
    compaction->source = TM_NO_SPAN;
    compaction->punched += punch_unused(slots, class, index);
    if (!slots->spans[index].n_live) {
        retire_span(slots, index);
        return;
    }
    slots->spans[index].next = compaction->done;
    compaction->done = index;
}

bool slots_next_move(struct slots *slots, struct compaction *compaction, struct slots_move *move)
{
    struct size_class *class = class_of(slots, compaction->size);
    bool found = false;
    pthread_mutex_lock(&class->lock);
    for (;;) {
        if (compaction->source == TM_NO_SPAN) {
            compaction->source = emptiest(slots, class);
            if (compaction->source == TM_NO_SPAN)
                break;
            compaction->slot = span_slots(compaction->size);
            move_to_list(slots, class, compaction->source, SPAN_ISOLATED);
        }
        found = span_next_live_below(&slots->spans[compaction->source], &compaction->slot) &&
                find_move(slots, class, compaction, move);
        if (found)
            break;
        leave_source(slots, class, compaction);
    }
    pthread_mutex_unlock(&class->lock);
    return found;
}

void slots_end_moves(struct slots *slots, struct compaction *compaction)
{
    struct size_class *class = class_of(slots, compaction->size);
    pthread_mutex_lock(&class->lock);
    if (compaction->source != TM_NO_SPAN)
        leave_source(slots, class, compaction);
    while (compaction->done != TM_NO_SPAN) {
        uint32_t index = compaction->done;
        compaction->done = slots->spans[index].next;
        compaction->punched += put_back(slots, class, index);
    }
    pthread_mutex_unlock(&class->lock);
}
