#include "device.h"

/* A refused put moves at most this many records of a class to get memory, enough to empty a page of the smallest slots; where
 * there is a file only if more than this part of the pool is free slots. Overwriting a full pool without upkeep, which leaves
 * 1.3 % of it free, without that bound: 11 % fewer spills, at 43 us of CPU for each of these. */
enum { RECLAIM_MOVES = 256, RECLAIM_SHARE = 32 };

/* Move one record, without waiting; false when its page is being changed, or its slot is not (or no longer) what a word
 * points at. */
static bool move_record(struct tm_device *device, uint32_t size, const struct tm_move *move)
{
    if (move->page >= device->layout.pages || !tm_try_lock(&device->locks, move->page))
        return false;
    uint64_t word = tm_word(device, move->page);
    bool moved = tm_kind(word) == TM_TMEM && tm_location(word) == move->from && tm_slot_size(tm_length(word)) == size;
    if (moved) {
        tm_copy_record(device, move->to, tm_record_of(device, word), tm_length(word));
        tm_publish(device, move->page, tm_with_location(word, move->to));
    }
    tm_unlock_run(&device->locks, move->page, 1);
    return moved;
}

/* Compact one class until `enough` bytes are given back, trying at most *moves records; returns the bytes. */
static uint64_t compact(struct tm_device *device, uint32_t size, uint64_t *moves, uint64_t enough)
{
    struct tm_compaction compaction = {.size = size, .source = TM_NO_SPAN, .done = TM_NO_SPAN};
    struct tm_move move;
    while (*moves && compaction.given < enough && tm_slots_next_move(&device->slots, &compaction, &move)) {
        if (move_record(device, size, &move))
            tm_count(&device->counters->moves, 1);
        else
            tm_slot_free(&device->slots, size, move.to);
        --*moves;
    }
    tm_slots_end_moves(&device->slots, &compaction);
    return compaction.given;
}

uint64_t tm_compact(struct tm_device *device, uint64_t moves)
{
    uint64_t given = 0;
    for (uint32_t size = TM_SLOT_MIN; size <= TM_SLOT_MAX; size += TM_SLOT_ALIGN)
        given += compact(device, size, &moves, UINT64_MAX);
    return given;
}

bool tm_is_wasteful(const struct tm_device *device)
{
    uint64_t used = atomic_load_explicit(&device->counters->used, memory_order_relaxed);
    return tm_slots_free_bytes(&device->slots) >= used / RECLAIM_SHARE;
}

bool tm_reclaim(struct tm_device *device)
{
    if (tm_has_file(device) && !tm_is_wasteful(device))
        return false;
    /* Large slots first: they take the fewest moves for a page. */
    for (uint32_t size = TM_SLOT_MAX; size >= TM_SLOT_MIN; size -= TM_SLOT_ALIGN) {
        uint64_t moves = RECLAIM_MOVES;
        if (tm_slots_free_of(&device->slots, size) >= TM_PAGE && compact(device, size, &moves, 1))
            return true;
    }
    return false;
}
