/* SPDX-License-Identifier: BSD-3-Clause */
#include "compact.h"

#include "index.h"
#include "probes.h"

/* A refused put moves at most this many records of a class to get memory, enough to empty a page of
 * the smallest slots; where there is a file only if more than this part of the pool is free slots.
 * Overwriting a full pool without maintenance, which leaves 1.3 % of it free, without that bound:
 * 11 % fewer spills, at 43 us of CPU for each of these. */
enum { RECLAIM_MOVES = 256, RECLAIM_SHARE = 32 };

/* Move one record; false when its page is being changed, or no word points at it (any more). */
static bool move_record(struct tm_device *device, uint32_t size, const struct slots_move *move)
{
    if (move->page >= device->layout.pages || !lock_try_page(&device->locks, move->page))
        return false;
    uint64_t word = index_word(device, move->page);
    bool moved = word_kind(word) == TM_TMEM && word_location(word) == move->from &&
                 word_slot_size(word_length(word)) == size;
    if (moved) {
        slots_fill(&device->slots, move->to, slots_record(&device->slots, move->from),
                   word_length(word));
        index_set(device, move->page, word_with_location(word, move->to));
    }
    unlock_pages(&device->locks, move->page, 1);
    PROBE(compact, device->name, move->page, moved);
    return moved;
}

/* Compact one class until `enough` bytes are punched out, trying *moves records; returns bytes. */
static uint64_t compact(struct tm_device *device, uint32_t size, uint64_t *moves, uint64_t enough)
{
    struct compaction compaction = {.size = size, .source = TM_NO_SPAN, .done = TM_NO_SPAN};
    struct slots_move move;
    while (*moves && compaction.punched < enough &&
           slots_next_move(&device->slots, &compaction, &move)) {
        if (move_record(device, size, &move))
            stats_add(&device->counters->moves, 1);
        else
            slots_free(&device->slots, size, move.to);
        --*moves;
    }
    slots_end_moves(&device->slots, &compaction);
    return compaction.punched;
}

uint64_t tm_compact(struct tm_device *device, uint64_t moves)
{
    uint64_t punched = 0;
    for (uint32_t size = TM_SLOT_MIN; size <= TM_SLOT_MAX; size += TM_SLOT_ALIGN)
        punched += compact(device, size, &moves, UINT64_MAX);
    return punched;
}

bool compact_is_worth(const struct tm_device *device)
{
    uint64_t used = atomic_load_explicit(&device->counters->used, memory_order_relaxed);
    return slots_free_bytes(&device->slots) >= used / RECLAIM_SHARE;
}

bool compact_reclaim(struct tm_device *device)
{
    if (state_has_file(device) && !compact_is_worth(device))
        return false;
    /* Large slots first: they take the fewest moves for a page. */
    for (uint32_t size = TM_SLOT_MAX; size >= TM_SLOT_MIN; size -= TM_SLOT_ALIGN) {
        uint64_t moves = RECLAIM_MOVES;
        if (slots_free_of(&device->slots, size) >= TM_PAGE && compact(device, size, &moves, 1))
            return true;
    }
    return false;
}
