#include <errno.h>

#include "device.h"

/* Copy stored pages that the file does not have yet; they stay stored. Under the run's change locks. */
static int copy_to_file(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    uint64_t word;
    for (uint32_t i = 0; i < n; i++)
        if (!tm_copy_out(device, first + i, content + (size_t)i * TM_PAGE, &word))
            return EAGAIN;
    int error = tm_file_write(&device->file, first, n, content);
    if (!error)
        device->vain.age = TM_GENERATIONS; /* these may go now, whatever the bound */
    for (uint32_t i = 0; i < n && !error; i++) {
        tm_look(&device->locks, first + i);
        tm_touch(device, first + i, tm_word(device, first + i) | TM_WORD_FLAG);
        tm_unlook(&device->locks, first + i);
    }
    return error;
}

static int zero_in_file(struct tm_device *device, uint64_t first, uint32_t n)
{
    int error = tm_file_zero(&device->file, first, n);
    for (uint32_t i = 0; i < n && !error; i++)
        tm_publish(device, first + i, TM_NOWHERE);
    return error;
}

enum chore { NOTHING, COPY, ZERO, IMPOSSIBLE };

static enum chore chore_of(const struct tm_device *device, uint64_t word)
{
    switch (tm_kind(word)) {
    case TM_TMEM:
        return word & TM_WORD_FLAG ? NOTHING : COPY;
    case TM_ZERO:
        return ZERO;
    case TM_LOST:
        return device->lost_zero ? ZERO : IMPOSSIBLE; /* the file cannot say 'lost', only the map can */
    default:
        return NOTHING;
    }
}

/* Do one run's chores. EAGAIN: there is a page that the file cannot hold. */
static int clean_run(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    enum chore chores[TM_RUN_MAX];
    int error = 0;
    if (!tm_in_index(device, first / TM_BLOCK_PAGES))
        return 0; /* trimmed as a whole meanwhile, which has called the granule's cleaning off */
    for (uint32_t i = 0; i < n; i++)
        chores[i] = chore_of(device, tm_peek(device, first + i));
    for (uint32_t i = 0, run; i < n && !error; i += run) {
        for (run = 1; i + run < n && chores[i + run] == chores[i]; run++)
            ;
        if (chores[i] == COPY)
            error = copy_to_file(device, first + i, run, content);
        else if (chores[i] == ZERO)
            error = zero_in_file(device, first + i, run);
        else if (chores[i] == IMPOSSIBLE)
            error = EAGAIN;
    }
    return error;
}

/* A block that is not in the index, under its change locks and index_lock. One that is lost as a whole has no page that is
 * written through. */
static int clean_state(struct tm_device *device, uint64_t block)
{
    uint8_t state = atomic_load(&device->blocks[block]);
    if (state == TM_STATE_LOST && !device->lost_zero)
        return EAGAIN;
    if (state != TM_STATE_ZERO && state != TM_STATE_LOST)
        return 0;
    int error = tm_file_zero(&device->file, block * TM_BLOCK_PAGES, tm_block_pages(device, block));
    if (error)
        return error;
    if (state == TM_STATE_LOST)
        tm_uncount(&device->counters->pages_lost, tm_block_pages(device, block));
    atomic_store_explicit(&device->states[block], TM_STATE_INDEX, memory_order_release);
    atomic_store_explicit(&device->blocks[block], TM_STATE_INDEX, memory_order_release);
    return 0;
}

static int clean_in_index(struct tm_device *device, uint64_t first, uint64_t end)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = 0;
    for (uint64_t page = first; page < end && !error; page += TM_RUN_MAX) {
        uint32_t n = end - page < TM_RUN_MAX ? (uint32_t)(end - page) : TM_RUN_MAX;
        tm_lock_run(&device->locks, page, n);
        error = clean_run(device, page, n, bounce->pages);
        tm_unlock_run(&device->locks, page, n);
    }
    tm_bounce_put(&device->file, bounce);
    return error;
}

static int clean_block(struct tm_device *device, uint64_t block)
{
    uint64_t first = block * TM_BLOCK_PAGES;
    uint32_t n = tm_block_pages(device, block);
    tm_lock_run(&device->locks, first, n);
    pthread_mutex_lock(&device->index_lock);
    bool in_index = tm_in_index(device, block);
    int error = in_index ? 0 : clean_state(device, block);
    pthread_mutex_unlock(&device->index_lock);
    tm_unlock_run(&device->locks, first, n);
    return in_index ? clean_in_index(device, first, first + n) : error;
}

static int clean_granule(struct tm_device *device, uint64_t granule)
{
    uint64_t first = granule * device->map.granule_pages, end = first + device->map.granule_pages;
    end = end < device->layout.pages ? end : device->layout.pages;
    int error = 0;
    for (uint64_t block = first / TM_BLOCK_PAGES; block * TM_BLOCK_PAGES < end && !error; block++)
        error = clean_block(device, block);
    return error;
}

/* After this, whoever was changing a page when it began has published what he had. */
void tm_wait_for_changes(struct tm_device *device)
{
    for (uint32_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_lock(&device->locks.stripes[i].change);
        pthread_mutex_unlock(&device->locks.stripes[i].change);
    }
}

int tm_clean(struct tm_device *device)
{
    int failed = 0;
    tm_map_begin_cleaning(&device->map);
    tm_wait_for_changes(device);
    for (uint64_t granule = 0; granule < device->map.n; granule++) {
        if (!tm_map_is_cleaning(&device->map, granule))
            continue;
        int error = failed ? failed : clean_granule(device, granule);
        if (error)
            tm_map_keep(&device->map, granule);
        failed = error && error != EAGAIN ? error : failed;
    }
    int error = tm_file_sync(&device->file);
    for (uint64_t granule = 0; error && granule < device->map.n; granule++)
        tm_map_keep(&device->map, granule);
    if (!error)
        error = tm_map_finish_cleaning(&device->map);
    return failed ? failed : error;
}

int tm_flush(struct tm_device *device)
{
    tm_count(&device->counters->flushes, 1);
    if (!device->durable || !tm_has_file(device))
        return 0;
    pthread_mutex_lock(&device->clean_lock);
    int error = tm_clean(device);
    pthread_mutex_unlock(&device->clean_lock);
    return error ? EIO : 0;
}
