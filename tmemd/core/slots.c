#define _GNU_SOURCE
#include "slots.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A class grows by this share of what it has, between 1 and 16 pages: small classes waste less than a page, large ones
 * call fallocate once for about fifty records. */
enum { GROW_SHARE = 32, GROW_MAX = 16 };

static uint32_t slots_in_span(uint32_t size) { return TM_SPAN_BYTES / size; }
static uint32_t bitmap_words(uint32_t size) { return (slots_in_span(size) + 63) / 64; }
static struct tm_class *class_of(struct tm_slots *slots, uint32_t size) { return &slots->classes[size / TM_SLOT_ALIGN]; }

/* Pages of a span that its slots reach into, as a mask. */
static uint64_t usable_pages(uint32_t size)
{
    uint32_t pages = (slots_in_span(size) * size + TM_PAGE - 1) / TM_PAGE;
    return pages == TM_SPAN_PAGES ? UINT64_MAX : (UINT64_C(1) << pages) - 1;
}

/* Pages that a slot lies in, as a mask. */
static uint64_t slot_pages(uint32_t size, uint32_t slot)
{
    uint32_t first = slot * size / TM_PAGE, last = (slot * size + size - 1) / TM_PAGE;
    return (UINT64_C(2) << last) - (UINT64_C(1) << first);
}

static bool is_free(const struct tm_span *span, uint32_t slot) { return span->free[slot / 64] >> slot % 64 & 1; }

static bool is_backed(const struct tm_span *span, uint32_t slot)
{
    uint64_t pages = slot_pages(span->size, slot);
    return (span->backed & pages) == pages;
}

static bool is_live(const struct tm_span *span, uint32_t slot) { return is_backed(span, slot) && !is_free(span, slot); }

/* First and one-past-last slot that reach into pages [first, last). */
static uint32_t slot_from(uint32_t size, uint32_t first) { return first * TM_PAGE / size; }
static uint32_t slot_to(uint32_t size, uint32_t last)
{
    uint32_t end = (last * TM_PAGE + size - 1) / size;
    return end < slots_in_span(size) ? end : slots_in_span(size);
}

int tm_slots_init(struct tm_slots *slots, int pool_fd, uint8_t *data, const struct tm_layout *layout,
                  struct tm_budget *budget)
{
    slots->pool_fd = pool_fd;
    slots->data = data;
    slots->data_offset = layout->data_offset;
    slots->budget = budget;
    slots->n_spans = (uint32_t)(layout->data_bytes / TM_SPAN_BYTES);
    slots->unused = TM_NO_SPAN;
    slots->fresh = 0;
    pthread_mutex_init(&slots->lock, NULL);
    for (size_t i = 0; i < TM_CLASSES; i++) {
        slots->classes[i] = (struct tm_class){.partial = TM_NO_SPAN, .growing = TM_NO_SPAN};
        pthread_mutex_init(&slots->classes[i].lock, NULL);
    }
    slots->spans = mmap(NULL, slots->n_spans * sizeof *slots->spans, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return slots->spans == MAP_FAILED ? errno : 0;
}

void tm_slots_destroy(struct tm_slots *slots)
{
    if (!slots->spans || slots->spans == MAP_FAILED)
        return;
    for (uint32_t i = 0; i < slots->fresh; i++)
        free(slots->spans[i].free);
    munmap(slots->spans, slots->n_spans * sizeof *slots->spans);
    for (size_t i = 0; i < TM_CLASSES; i++)
        pthread_mutex_destroy(&slots->classes[i].lock);
    pthread_mutex_destroy(&slots->lock);
}

static void list_span(struct tm_slots *slots, struct tm_class *class, uint32_t index)
{
    struct tm_span *span = &slots->spans[index];
    span->prev = TM_NO_SPAN;
    span->next = class->partial;
    if (class->partial != TM_NO_SPAN)
        slots->spans[class->partial].prev = index;
    class->partial = index;
    span->listed = true;
}

static void unlist_span(struct tm_slots *slots, struct tm_class *class, uint32_t index)
{
    struct tm_span *span = &slots->spans[index];
    if (span->prev != TM_NO_SPAN)
        slots->spans[span->prev].next = span->next;
    else
        class->partial = span->next;
    if (span->next != TM_NO_SPAN)
        slots->spans[span->next].prev = span->prev;
    span->listed = false;
}

static void count_free(struct tm_class *class, struct tm_span *span, int64_t n)
{
    span->n_free = (uint16_t)(span->n_free + n);
    class->n_free += (uint64_t)n;
}

static bool assign_span(struct tm_span *span, uint32_t size)
{
    span->free = calloc(bitmap_words(size), sizeof *span->free);
    span->size = size;
    span->n_free = span->n_live = 0;
    span->listed = false;
    return span->free != NULL;
}

/* A span without a class, now of this one; TM_NO_SPAN when there is none. */
static uint32_t new_span(struct tm_slots *slots, uint32_t size)
{
    pthread_mutex_lock(&slots->lock);
    uint32_t index = slots->unused;
    if (index != TM_NO_SPAN)
        slots->unused = slots->spans[index].next;
    else if (slots->fresh < slots->n_spans)
        index = slots->fresh++;
    pthread_mutex_unlock(&slots->lock);
    return index != TM_NO_SPAN && assign_span(&slots->spans[index], size) ? index : TM_NO_SPAN;
}

static uint64_t run_mask(uint32_t first, uint32_t n)
{
    return (n == 64 ? UINT64_MAX : (UINT64_C(1) << n) - 1) << first;
}

/* Punch out the pages of the mask, each run of neighbours by one call. */
static void punch(struct tm_slots *slots, uint32_t index, uint64_t pages)
{
    uint64_t base = slots->data_offset + (uint64_t)index * TM_SPAN_BYTES;
    slots->spans[index].backed &= ~pages;
    while (pages) {
        uint32_t first = (uint32_t)__builtin_ctzll(pages);
        uint64_t rest = ~(pages >> first);
        uint32_t n = rest ? (uint32_t)__builtin_ctzll(rest) : TM_SPAN_PAGES;
        tm_give(slots->budget, slots->pool_fd, base + (uint64_t)first * TM_PAGE, (uint64_t)n * TM_PAGE);
        pages &= ~run_mask(first, n);
    }
}

/* Give a span without live slots back, memory and class. */
static void release_span(struct tm_slots *slots, struct tm_class *class, uint32_t index)
{
    struct tm_span *span = &slots->spans[index];
    class->backed_pages -= (uint64_t)__builtin_popcountll(span->backed);
    punch(slots, index, span->backed);
    count_free(class, span, -(int64_t)span->n_free);
    if (span->listed)
        unlist_span(slots, class, index);
    if (class->growing == index)
        class->growing = TM_NO_SPAN;
    free(span->free);
    span->free = NULL;
    pthread_mutex_lock(&slots->lock);
    span->next = slots->unused;
    slots->unused = index;
    pthread_mutex_unlock(&slots->lock);
}

/* Allocate up to `want` more pages of the growing span, lowest first; false: refused. */
static bool grow_span(struct tm_slots *slots, struct tm_class *class, uint32_t size, uint32_t want)
{
    uint32_t index = class->growing;
    struct tm_span *span = &slots->spans[index];
    uint64_t missing = usable_pages(size) & ~span->backed;
    uint32_t first = (uint32_t)__builtin_ctzll(missing);
    uint64_t rest = ~(missing >> first);
    uint32_t n = rest ? (uint32_t)__builtin_ctzll(rest) : TM_SPAN_PAGES;
    n = n < want ? n : want;
    uint64_t offset = slots->data_offset + (uint64_t)index * TM_SPAN_BYTES + (uint64_t)first * TM_PAGE;
    if (tm_take(slots->budget, slots->pool_fd, offset, (uint64_t)n * TM_PAGE, tm_target(slots->budget)) != 0)
        return false;
    span->backed |= run_mask(first, n);
    class->backed_pages += n;
    int64_t gained = 0;
    for (uint32_t slot = slot_from(size, first); slot < slot_to(size, first + n); slot++)
        if (is_backed(span, slot)) {
            span->free[slot / 64] |= UINT64_C(1) << slot % 64;
            gained++;
        }
    count_free(class, span, gained);
    return true;
}

/* Make at least one slot of the class free; false: refused. */
static bool grow(struct tm_slots *slots, struct tm_class *class, uint32_t size)
{
    if (class->growing == TM_NO_SPAN || !(usable_pages(size) & ~slots->spans[class->growing].backed))
        class->growing = new_span(slots, size);
    if (class->growing == TM_NO_SPAN)
        return false;
    uint64_t share = class->backed_pages / GROW_SHARE;
    uint32_t want = share < 1 ? 1 : share > GROW_MAX ? GROW_MAX : (uint32_t)share;
    struct tm_span *span = &slots->spans[class->growing];
    while (!span->n_free) /* one page may hold less than a slot */
        if (!grow_span(slots, class, size, want) && (want == 1 || !grow_span(slots, class, size, 1)))
            break;
    if (!span->n_free && !span->n_live && !span->backed)
        release_span(slots, class, class->growing);
    else if (span->n_free)
        list_span(slots, class, class->growing);
    return class->partial != TM_NO_SPAN;
}

static uint32_t lowest_free(const struct tm_span *span)
{
    uint32_t word = 0;
    while (!span->free[word])
        word++;
    return word * 64 + (uint32_t)__builtin_ctzll(span->free[word]);
}

static uint64_t take_slot(struct tm_slots *slots, struct tm_class *class, uint32_t index)
{
    struct tm_span *span = &slots->spans[index];
    uint32_t slot = lowest_free(span);
    span->free[slot / 64] &= ~(UINT64_C(1) << slot % 64);
    span->n_live++;
    count_free(class, span, -1);
    if (!span->n_free)
        unlist_span(slots, class, index);
    return (uint64_t)index * TM_SPAN_BYTES + (uint64_t)slot * span->size;
}

bool tm_slot_alloc(struct tm_slots *slots, uint32_t size, uint64_t *location)
{
    struct tm_class *class = class_of(slots, size);
    pthread_mutex_lock(&class->lock);
    bool found = class->partial != TM_NO_SPAN || grow(slots, class, size);
    if (found)
        *location = take_slot(slots, class, class->partial);
    pthread_mutex_unlock(&class->lock);
    return found;
}

void tm_slot_free(struct tm_slots *slots, uint32_t size, uint64_t location)
{
    struct tm_class *class = class_of(slots, size);
    uint32_t index = (uint32_t)(location / TM_SPAN_BYTES), slot = (uint32_t)(location % TM_SPAN_BYTES) / size;
    struct tm_span *span = &slots->spans[index];
    pthread_mutex_lock(&class->lock);
    span->free[slot / 64] |= UINT64_C(1) << slot % 64;
    span->n_live--;
    count_free(class, span, 1);
    if (!span->listed)
        list_span(slots, class, index);
    if (!span->n_live && class->n_free > span->n_free)
        release_span(slots, class, index); /* others have free slots: the next put need not grow */
    pthread_mutex_unlock(&class->lock);
}

void tm_slots_backed(struct tm_slots *slots, uint64_t offset, uint64_t bytes)
{
    for (uint64_t at = offset; at < offset + bytes; at += TM_PAGE) {
        uint32_t index = (uint32_t)(at / TM_SPAN_BYTES);
        slots->spans[index].backed |= UINT64_C(1) << at % TM_SPAN_BYTES / TM_PAGE;
        if (index >= slots->fresh)
            slots->fresh = index + 1;
    }
}

bool tm_slots_claim(struct tm_slots *slots, uint32_t size, uint64_t location)
{
    uint32_t index = (uint32_t)(location / TM_SPAN_BYTES), at = (uint32_t)(location % TM_SPAN_BYTES);
    if (location / TM_SPAN_BYTES >= slots->fresh || at % size || at / size >= slots_in_span(size))
        return false;
    struct tm_span *span = &slots->spans[index];
    if (!span->free && !assign_span(span, size))
        return false;
    uint32_t slot = at / size;
    if (span->size != size || is_free(span, slot) || !is_backed(span, slot))
        return false;
    span->free[slot / 64] |= UINT64_C(1) << slot % 64; /* until finish, a bit here means 'live' */
    span->n_live++;
    return true;
}

/* Backed pages of a span that no live slot reaches into, as a mask. */
static uint64_t dead_pages(const struct tm_span *span)
{
    uint64_t live = 0;
    for (uint32_t slot = 0; slot < slots_in_span(span->size); slot++)
        if (is_live(span, slot))
            live |= slot_pages(span->size, slot);
    return span->backed & ~live;
}

static void punch_span(struct tm_slots *slots, struct tm_class *class, uint32_t index, uint64_t pages)
{
    struct tm_span *span = &slots->spans[index];
    int64_t lost = 0;
    punch(slots, index, pages);
    class->backed_pages -= (uint64_t)__builtin_popcountll(pages);
    for (uint32_t slot = 0; slot < slots_in_span(span->size); slot++)
        if (is_free(span, slot) && !is_backed(span, slot)) {
            span->free[slot / 64] &= ~(UINT64_C(1) << slot % 64);
            lost++;
        }
    count_free(class, span, -lost);
    if (span->listed && !span->n_free)
        unlist_span(slots, class, index);
    if (usable_pages(span->size) & ~span->backed)
        class->growing = index;
}

/* Turn the bits from 'live' into 'free'. */
static void finish_span(struct tm_slots *slots, struct tm_class *class, uint32_t index)
{
    struct tm_span *span = &slots->spans[index];
    int64_t n_free = 0;
    for (uint32_t slot = 0; slot < slots_in_span(span->size); slot++) {
        span->free[slot / 64] ^= UINT64_C(1) << slot % 64;
        if (!is_backed(span, slot))
            span->free[slot / 64] &= ~(UINT64_C(1) << slot % 64);
        n_free += is_free(span, slot);
    }
    count_free(class, span, n_free);
    class->backed_pages += (uint64_t)__builtin_popcountll(span->backed);
    if (n_free)
        list_span(slots, class, index);
    punch_span(slots, class, index, dead_pages(span));
}

void tm_slots_finish(struct tm_slots *slots)
{
    for (uint32_t index = slots->fresh; index-- > 0;) {
        struct tm_span *span = &slots->spans[index];
        if (span->free) {
            finish_span(slots, class_of(slots, span->size), index);
            continue;
        }
        punch(slots, index, span->backed);
        span->next = slots->unused;
        slots->unused = index;
    }
}

/* The emptiest and, apart from it, the fullest of the class's spans with free slots. */
static void pick_spans(struct tm_slots *slots, struct tm_class *class, uint32_t *emptiest, uint32_t *fullest)
{
    *emptiest = *fullest = class->partial;
    for (uint32_t i = class->partial; i != TM_NO_SPAN; i = slots->spans[i].next)
        if (slots->spans[i].n_live < slots->spans[*emptiest].n_live)
            *emptiest = i;
    for (uint32_t i = class->partial; i != TM_NO_SPAN; i = slots->spans[i].next)
        if (i != *emptiest && (*fullest == *emptiest || slots->spans[i].n_live > slots->spans[*fullest].n_live))
            *fullest = i;
}

static bool highest_live(const struct tm_span *span, uint32_t *slot)
{
    for (*slot = slots_in_span(span->size); (*slot)-- > 0;)
        if (is_live(span, *slot))
            return true;
    return false;
}

bool tm_slots_next_move(struct tm_slots *slots, uint32_t size, struct tm_move *move)
{
    struct tm_class *class = class_of(slots, size);
    uint32_t emptiest, fullest, slot;
    bool found = false;
    pthread_mutex_lock(&class->lock);
    if (class->partial != TM_NO_SPAN) {
        pick_spans(slots, class, &emptiest, &fullest);
        const struct tm_span *from = &slots->spans[emptiest];
        found = highest_live(from, &slot) && (fullest != emptiest || lowest_free(from) < slot);
        if (found) {
            move->from = (uint64_t)emptiest * TM_SPAN_BYTES + (uint64_t)slot * size;
            move->to = take_slot(slots, class, fullest);
            const struct tm_record *record = (const struct tm_record *)(slots->data + move->from);
            move->page = atomic_load_explicit(&record->page, memory_order_relaxed);
        }
    }
    pthread_mutex_unlock(&class->lock);
    return found;
}

uint64_t tm_slots_punch(struct tm_slots *slots, uint32_t size)
{
    struct tm_class *class = class_of(slots, size);
    uint64_t pages = 0;
    pthread_mutex_lock(&class->lock);
    for (uint32_t i = class->partial, next; i != TM_NO_SPAN; i = next) {
        next = slots->spans[i].next;
        uint64_t dead = dead_pages(&slots->spans[i]);
        pages += (uint64_t)__builtin_popcountll(dead);
        if (!slots->spans[i].n_live)
            release_span(slots, class, i);
        else if (dead)
            punch_span(slots, class, i, dead);
    }
    pthread_mutex_unlock(&class->lock);
    return pages * TM_PAGE;
}

uint64_t tm_slots_free_bytes(struct tm_slots *slots)
{
    uint64_t bytes = 0;
    for (uint32_t size = TM_SLOT_MIN; size <= TM_SLOT_MAX; size += TM_SLOT_ALIGN) {
        struct tm_class *class = class_of(slots, size);
        pthread_mutex_lock(&class->lock);
        bytes += class->n_free * size;
        pthread_mutex_unlock(&class->lock);
    }
    return bytes;
}
