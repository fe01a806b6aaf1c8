/* Candidate A: spans of 256 KiB, each cut into slots of one size; memory is taken from the host page by page. */
#include "store.h"

enum {
    GRAIN = 16,
    SPAN = 256 << 10,
    SPAN_PAGES = SPAN / PAGE,
    CLASSES = (MAX_RECORD + GRAIN - 1) / GRAIN + 1,
    MIN_SLOT = 32,
    WORDS = SPAN / MIN_SLOT / 64,
};

struct span {
    uint64_t used[WORDS];   /* slots with a live record */
    uint64_t ready[WORDS];  /* slots without one whose pages are all backed */
    uint64_t backed;    /* pages taken from the host */
    uint32_t class_, position, slots, used_count, ready_count;
};

struct class_ {
    uint32_t *spans;    /* ascending */
    size_t count, hint; /* no span before the hint has a ready slot */
    size_t backed_pages;
};

static struct span *spans;
static size_t span_count;
static struct class_ classes[CLASSES];

static size_t slot_size(const struct span *span)
{
    return (size_t)span->class_ * GRAIN;
}

static uint64_t pages_of(const struct span *span, uint32_t slot)
{
    size_t first = slot * slot_size(span) / PAGE, last = ((slot + 1) * slot_size(span) - 1) / PAGE;
    return (~0ull >> (63 - last)) & (~0ull << first);
}

static int test(const uint64_t *bits, uint32_t i)
{
    return bits[i / 64] >> (i % 64) & 1;
}

static void flip(uint64_t *bits, uint32_t i)
{
    bits[i / 64] ^= 1ull << (i % 64);
}

static void mark_ready(struct span *span, uint32_t slot)
{
    flip(span->ready, slot);
    span->ready_count++;
    struct class_ *class_ = &classes[span->class_];
    if (span->position < class_->hint)
        class_->hint = span->position;
}

static void claim(struct span *span, uint32_t slot)
{
    flip(span->ready, slot);
    span->ready_count--;
    flip(span->used, slot);
    span->used_count++;
}

static void release(struct span *span, uint32_t slot)
{
    flip(span->used, slot);
    span->used_count--;
    mark_ready(span, slot);
}

static void back_pages(struct span *span, size_t first, size_t count)
{
    arena_back(&slots.arena, (span - spans) * (size_t)SPAN + first * PAGE, count * PAGE);
    span->backed |= (~0ull >> (64 - count)) << first;
    classes[span->class_].backed_pages += count;
    size_t size = slot_size(span), last = (first + count) * PAGE / size;
    for (size_t slot = first * PAGE / size; slot <= last && slot < span->slots; slot++)
        if (!test(span->used, slot) && !test(span->ready, slot) && !(pages_of(span, slot) & ~span->backed))
            mark_ready(span, slot);
}

/* Back the lowest slot of a span that is neither used nor ready, and some pages after it. */
static void grow(struct span *span)
{
    uint32_t slot = 0;
    while (test(span->used, slot) || test(span->ready, slot))
        slot++;
    uint64_t needed = pages_of(span, slot) & ~span->backed;
    size_t first = __builtin_ctzll(needed), last = 63 - __builtin_clzll(needed);
    size_t chunk = classes[span->class_].backed_pages / 32;
    chunk = chunk < 1 ? 1 : chunk > 16 ? 16 : chunk;
    size_t end = first;
    while (end < SPAN_PAGES && !(span->backed >> end & 1) && (end <= last || end < first + chunk))
        end++;
    back_pages(span, first, end - first);
}

static struct span *add_span(struct class_ *class_)
{
    uint32_t number = 0;
    while (number < span_count && spans[number].class_)
        number++;
    if (number == span_count) {
        fprintf(stderr, "slots: the arena is full\n");
        exit(1);
    }
    struct span *span = &spans[number];
    span->class_ = class_ - classes;
    span->slots = SPAN / slot_size(span);
    class_->spans = realloc(class_->spans, (class_->count + 1) * sizeof *class_->spans);
    size_t at = class_->count++;
    for (; at > 0 && class_->spans[at - 1] > number; at--) {
        class_->spans[at] = class_->spans[at - 1];
        spans[class_->spans[at]].position = at;
    }
    class_->spans[at] = number;
    span->position = at;
    return span;
}

static void drop_span(struct span *span)
{
    struct class_ *class_ = &classes[span->class_];
    class_->count--;
    for (size_t at = span->position; at < class_->count; at++) {
        class_->spans[at] = class_->spans[at + 1];
        spans[class_->spans[at]].position = at;
    }
    class_->hint = 0;
    *span = (struct span){0};
}

static struct span *span_with_room(struct class_ *class_)
{
    for (; class_->hint < class_->count; class_->hint++)
        if (spans[class_->spans[class_->hint]].ready_count)
            return &spans[class_->spans[class_->hint]];
    for (size_t i = 0; i < class_->count; i++) {
        struct span *span = &spans[class_->spans[i]];
        if (span->used_count < span->slots) {
            class_->hint = i;
            return span;
        }
    }
    return add_span(class_);
}

static uint32_t first_set(const uint64_t *bits)
{
    uint32_t word = 0;
    while (!bits[word])
        word++;
    return word * 64 + __builtin_ctzll(bits[word]);
}

static uint32_t last_set(const uint64_t *bits)
{
    uint32_t word = WORDS - 1;
    while (!bits[word])
        word--;
    return word * 64 + 63 - __builtin_clzll(bits[word]);
}

static size_t allocate(size_t length)
{
    size_t units = (length + GRAIN - 1) / GRAIN;
    struct span *span = span_with_room(&classes[units < MIN_SLOT / GRAIN ? MIN_SLOT / GRAIN : units]);
    while (!span->ready_count)
        grow(span);
    uint32_t slot = first_set(span->ready);
    claim(span, slot);
    return (span - spans) * (size_t)SPAN + slot * slot_size(span);
}

static void slots_open(size_t pages, double budget)
{
    (void)budget;
    span_count = pages * 2 * PAGE / SPAN + 2 * CLASSES;
    spans = calloc(span_count, sizeof *spans);
    arena_open(&slots.arena, pages, span_count * SPAN);
}

static void release_at(size_t offset)
{
    struct span *span = &spans[offset / SPAN];
    slots.payload -= record_length(slots.arena.data + offset) - HEADER;
    release(span, offset % SPAN / slot_size(span));
}

static void slots_put(uint32_t page, const uint8_t *src)
{
    uint8_t record[MAX_RECORD + 64];
    size_t length = record_encode(record, page, src), offset = allocate(length);
    memcpy(slots.arena.data + offset, record, length);
    slots.payload += length - HEADER;
    uint64_t old = slots.arena.index[page];
    slots.arena.index[page] = offset + 1;
    if (old)
        release_at(old - 1);
}

static void slots_get(uint32_t page, uint8_t *dst)
{
    record_decode(slots.arena.data + slots.arena.index[page] - 1, page, dst);
}

static int fuller_first(const void *a, const void *b)
{
    return (int)spans[*(const uint32_t *)b].used_count - (int)spans[*(const uint32_t *)a].used_count;
}

static void move(struct span *from, uint32_t slot, struct span *to)
{
    size_t source = (from - spans) * (size_t)SPAN + slot * slot_size(from);
    uint32_t hole = first_set(to->ready);
    size_t target = (to - spans) * (size_t)SPAN + hole * slot_size(to);
    claim(to, hole);
    memcpy(slots.arena.data + target, slots.arena.data + source, slot_size(from));
    slots.arena.index[record_page(slots.arena.data + source)] = target + 1;
    release(from, slot);
    slots.copies++;
}

/* Fill the holes of the fullest spans with the last records of the emptiest. */
static void compact_class(struct class_ *class_)
{
    uint32_t *order = malloc((class_->count + 1) * sizeof *order);
    memcpy(order, class_->spans, class_->count * sizeof *order);
    qsort(order, class_->count, sizeof *order, fuller_first);
    for (size_t to = 0, from = class_->count; from > to;) {
        struct span *source = &spans[order[from - 1]], *target = &spans[order[to]];
        if (!source->used_count)
            from--;
        else if (!target->ready_count || (source == target && first_set(target->ready) > last_set(source->used)))
            to++;
        else
            move(source, last_set(source->used), target);
    }
    free(order);
}

static void punch_span(struct span *span)
{
    uint64_t live = 0;
    for (uint32_t slot = 0; slot < span->slots; slot++)
        if (test(span->used, slot))
            live |= pages_of(span, slot);
    for (uint32_t page = 0; page < SPAN_PAGES; page++)
        if (span->backed >> page & ~(live >> page) & 1)
            arena_punch(&slots.arena, (span - spans) * (size_t)SPAN + page * PAGE, PAGE);
    classes[span->class_].backed_pages -= __builtin_popcountll(span->backed & ~live);
    span->backed &= live;
    for (uint32_t slot = 0; slot < span->slots; slot++)
        if (test(span->ready, slot) && pages_of(span, slot) & ~span->backed) {
            flip(span->ready, slot);
            span->ready_count--;
        }
}

static void slots_settle(void)
{
    for (struct class_ *class_ = classes; class_ < classes + CLASSES; class_++) {
        compact_class(class_);
        for (size_t i = class_->count; i-- > 0;) {
            struct span *span = &spans[class_->spans[i]];
            punch_span(span);
            if (!span->used_count)
                drop_span(span);
        }
    }
}

struct store slots = {.name = "slots", .open = slots_open, .put = slots_put, .get = slots_get, .settle = slots_settle};
