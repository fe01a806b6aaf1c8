/* Candidate B: an append-only log of segments; cost-benefit cleaning (Rosenblum's) keeps it within a budget. */
#include "store.h"

enum { SEGMENT = 256 << 10, ALIGN = 8 };

struct segment {
    uint64_t born;  /* puts so far when it was last appended to */
    uint32_t live, end;
    int taken;
};

static struct segment *segments;
static size_t segment_count, taken_count, heads[2]; /* heads: for puts, for cleaned records */
static size_t index_bytes;
static uint64_t put_count;
static double allowed; /* bytes of memory for each compressed byte */

static size_t aligned(size_t length)
{
    return (length + ALIGN - 1) / ALIGN * ALIGN;
}

static size_t take_segment(void)
{
    size_t at = 1;  /* segment 0 is never used, so that offset 0 means 'nowhere' */
    while (at < segment_count && segments[at].taken)
        at++;
    if (at == segment_count) {
        fprintf(stderr, "log: the arena is full\n");
        exit(1);
    }
    arena_back(&logged.arena, at * SEGMENT, SEGMENT);
    segments[at] = (struct segment){.taken = 1};
    taken_count++;
    return at;
}

static void give_back(size_t at)
{
    arena_punch(&logged.arena, at * SEGMENT, SEGMENT);
    segments[at] = (struct segment){0};
    taken_count--;
}

static void append(const uint8_t *record, size_t length, size_t *head)
{
    if (!*head || segments[*head].end + aligned(length) > SEGMENT)
        *head = take_segment();
    struct segment *segment = &segments[*head];
    size_t offset = *head * (size_t)SEGMENT + segment->end;
    memcpy(logged.arena.data + offset, record, length);
    segment->end += aligned(length);
    segment->live += aligned(length);
    segment->born = put_count;
    logged.arena.index[record_page(record)] = offset;
}

static size_t victim(void)
{
    size_t best = 0;
    double best_score = 0;
    for (size_t at = 1; at < segment_count; at++) {
        const struct segment *segment = &segments[at];
        if (!segment->taken || at == heads[0] || at == heads[1])
            continue;
        double used = (double)segment->live / SEGMENT;
        double score = (1 - used) * (double)(put_count - segment->born + 1) / (1 + used);
        if (score > best_score) {
            best_score = score;
            best = at;
        }
    }
    return best;
}

static void clean(size_t at)
{
    const uint8_t *base = logged.arena.data + at * SEGMENT;
    for (size_t offset = 0, length; offset < segments[at].end; offset += aligned(length)) {
        const uint8_t *record = base + offset;
        length = record_length(record);
        if (logged.arena.index[record_page(record)] == at * SEGMENT + offset) {
            append(record, length, &heads[1]);
            logged.copies++;
        }
    }
    give_back(at);
}

static void keep_budget(void)
{
    for (size_t tries = 0; tries < 64; tries++) {
        if (taken_count * (double)SEGMENT + index_bytes <= allowed * logged.payload)
            return;
        size_t at = victim();
        if (!at)
            return;
        clean(at);
    }
}

static void log_open(size_t pages, double budget)
{
    allowed = budget;
    index_bytes = pages * 8;
    segment_count = pages * 3 * PAGE / SEGMENT + 4;
    segments = calloc(segment_count, sizeof *segments);
    arena_open(&logged.arena, pages, segment_count * SEGMENT);
}

static void log_put(uint32_t page, const uint8_t *src)
{
    uint8_t record[MAX_RECORD + 64];
    size_t length = record_encode(record, page, src);
    uint64_t old = logged.arena.index[page];
    put_count++;
    append(record, length, &heads[0]);
    logged.payload += length - HEADER;
    if (old) {
        size_t old_length = record_length(logged.arena.data + old);
        segments[old / SEGMENT].live -= aligned(old_length);
        logged.payload -= old_length - HEADER;
        keep_budget();
    }
}

static void log_get(uint32_t page, uint8_t *dst)
{
    record_decode(logged.arena.data + logged.arena.index[page], page, dst);
}

/* The budget is kept with every put; idle time has nothing left to do. */
static void log_settle(void)
{
    keep_budget();
}

struct store logged = {.name = "log", .open = log_open, .put = log_put, .get = log_get, .settle = log_settle};
