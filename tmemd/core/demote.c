#include <errno.h>
#include <string.h>

#include "device.h"

/* Copy a stored page out, if it is one, old enough, and whole. */
static bool gather(struct tm_device *device, uint64_t page, unsigned age, uint8_t *content, uint64_t *word)
{
    return tm_copy_out(device, page, content, word) && tm_age_of(device, *word) >= age;
}

/* Write gathered pages to the file and let the index say so; readers find them in the pool until it does. */
static int move_to_file(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
                        const uint8_t *content, uint64_t *freed)
{
    bool filed = true;
    int error = 0;
    for (uint32_t i = 0; i < n; i++)
        filed = filed && words[i] & TM_WORD_FLAG;
    for (uint32_t i = 0; i < n && !filed && !error; i++)
        error = tm_map_mark(&device->map, first + i);
    if (!error && !filed)
        error = tm_file_write(&device->file, first, n, content);
    if (error) {
        tm_count(&device->counters->io_errors, 1);
        return error;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t crc = tm_crc32c(0, content + (size_t)i * TM_PAGE, TM_PAGE);
        tm_publish(device, first + i, tm_file_word(crc, tm_generation(words[i])));
        *freed += tm_slot_size(tm_length(words[i]));
    }
    tm_count(&device->counters->demotions, n);
    return 0;
}

static int demote_run(struct tm_device *device, uint64_t first, uint32_t n, unsigned age, uint64_t *freed)
{
    uint64_t words[TM_RUN_MAX];
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    tm_lock_run(&device->locks, first, n);
    int error = 0;
    for (uint32_t i = 0, run = 0; i <= n && !error; i++) {
        if (i < n && gather(device, first + i, age, bounce->pages + (size_t)run * TM_PAGE, &words[run])) {
            run++;
            continue;
        }
        if (run)
            error = move_to_file(device, first + i - run, run, words, bounce->pages, freed);
        run = 0;
    }
    tm_unlock_run(&device->locks, first, n);
    tm_bounce_put(&device->file, bounce);
    return error;
}

/* The age down to which pages must go for `bytes` of slots to come free. */
static unsigned demotion_age(struct tm_device *device, uint64_t bytes)
{
    uint64_t words[TM_BLOCK_PAGES], of_age[TM_GENERATIONS] = {0}, sum = 0;
    for (uint64_t block = 0; block < device->layout.blocks; block++) {
        if (!tm_copy_words(device, block, words))
            continue;
        for (uint32_t i = 0; i < tm_block_pages(device, block); i++)
            if (tm_kind(words[i]) == TM_TMEM)
                of_age[tm_age_of(device, words[i])] += tm_slot_size(tm_length(words[i]));
    }
    for (unsigned age = TM_GENERATIONS; age-- > 0;)
        if ((sum += of_age[age]) >= bytes)
            return age;
    return 0;
}

/* Demote what is old enough in one block, in runs of neighbours, until `freed` reaches `bytes`. */
static int demote_block(struct tm_device *device, uint64_t block, unsigned age, uint64_t bytes, uint64_t *freed)
{
    uint64_t words[TM_BLOCK_PAGES];
    int error = 0;
    if (!tm_copy_words(device, block, words))
        return 0;
    uint32_t n = tm_block_pages(device, block);
    for (uint32_t i = 0; i < n && *freed < bytes && !error;) {
        uint32_t run = 0;
        while (i + run < n && run < TM_RUN_MAX && tm_kind(words[i + run]) == TM_TMEM &&
               tm_age_of(device, words[i + run]) >= age)
            run++;
        if (run)
            error = demote_run(device, block * TM_BLOCK_PAGES + i, run, age, freed);
        i += run ? run : 1;
    }
    return error;
}

/* Under clean_lock. */
static int demote_aged(struct tm_device *device, unsigned age, uint64_t bytes, uint64_t *freed)
{
    uint64_t blocks = device->layout.blocks;
    int error = 0;
    for (uint64_t i = 0; i < blocks && *freed < bytes && !error; i++) {
        uint64_t block = device->hand;
        error = demote_block(device, block, age, bytes, freed);
        if (*freed < bytes)
            device->hand = (block + 1) % blocks;
    }
    return error;
}

int tm_demote(struct tm_device *device, uint64_t bytes, uint64_t *freed)
{
    *freed = 0;
    if (!tm_has_file(device))
        return ENOTSUP;
    pthread_mutex_lock(&device->clean_lock);
    int error = bytes ? demote_aged(device, demotion_age(device, bytes), bytes, freed) : 0;
    pthread_mutex_unlock(&device->clean_lock);
    return error;
}

int tm_drain(struct tm_device *device)
{
    if (!tm_has_file(device))
        return ENOTSUP;
    uint64_t freed = 0;
    pthread_mutex_lock(&device->clean_lock);
    atomic_store(&device->budget.draining, true);
    tm_wait_for_changes(device);
    int error = demote_aged(device, 0, UINT64_MAX, &freed);
    if (!error)
        error = tm_clean(device);
    if (!error && atomic_load(&device->counters->pages_in_tmem))
        error = EIO; /* a damaged record cannot be moved */
    atomic_store(&device->budget.draining, false);
    pthread_mutex_unlock(&device->clean_lock);
    tm_settle(device, 0);
    return error;
}

/* Move one record; false when its slot is not (or no longer) what a word points at. */
static bool move_record(struct tm_device *device, uint32_t size, const struct tm_move *move)
{
    bool moved = false;
    if (move->page < device->layout.pages) {
        tm_lock_run(&device->locks, move->page, 1);
        uint64_t word = tm_peek(device, move->page);
        moved = tm_kind(word) == TM_TMEM && tm_location(word) == move->from && tm_slot_size(tm_length(word)) == size;
        if (moved) {
            tm_copy_record(device, move->to, tm_record_of(device, word), tm_length(word));
            tm_publish(device, move->page, tm_with_location(word, move->to));
        }
        tm_unlock_run(&device->locks, move->page, 1);
    }
    if (!moved)
        tm_slot_free(&device->slots, size, move->to);
    return moved;
}

uint64_t tm_settle(struct tm_device *device, uint64_t moves)
{
    uint64_t given = 0;
    tm_reserve_fill(device);
    for (uint32_t size = TM_SLOT_MIN; size <= TM_SLOT_MAX; size += TM_SLOT_ALIGN) {
        struct tm_move move;
        given += tm_slots_punch(&device->slots, size);
        uint64_t before = moves;
        while (moves && tm_slots_next_move(&device->slots, size, &move) && move_record(device, size, &move)) {
            moves--;
            tm_count(&device->counters->moves, 1);
        }
        if (moves < before)
            given += tm_slots_punch(&device->slots, size);
    }
    return given;
}
