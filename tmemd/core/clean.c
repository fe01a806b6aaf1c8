/* The map is cleaned: what the file lacks is written there, and the bits of what nobody has changed meanwhile are cleared. */
#include <errno.h>

#include "device.h"

enum chore { NOTHING, COPY, ZERO, IMPOSSIBLE };

/* Neighbours that are looked after together, under their I/O lock. */
struct batch {
    uint64_t first;
    uint32_t n;
    uint8_t *content;
    enum chore chores[TM_RUN_MAX];
};

static enum chore chore_of(const struct tm_device *device, uint64_t word)
{
    switch (tm_kind(word)) {
    case TM_TMEM:
        return word & TM_WORD_CLEAN ? NOTHING : COPY;
    case TM_ZERO:
        return ZERO;
    case TM_LOST:
        return device->lost_zero ? ZERO : IMPOSSIBLE; /* the file cannot say 'lost', only the map can */
    case TM_TORN:
        return IMPOSSIBLE;
    default:
        return NOTHING;
    }
}

/* See what there is to do, and mark the pages it is about. */
static void take(struct tm_device *device, struct batch *batch)
{
    uint64_t word;
    tm_lock_run(&device->locks, batch->first, batch->n);
    for (uint32_t i = 0; i < batch->n; i++) {
        uint64_t page = batch->first + i;
        enum chore chore = chore_of(device, tm_word(device, page));
        if (chore == COPY && !tm_copy_out(device, page, batch->content + (size_t)i * TM_PAGE, &word))
            chore = IMPOSSIBLE;
        if (chore == COPY || chore == ZERO)
            tm_start_writing(device, page);
        batch->chores[i] = chore;
    }
    tm_unlock_run(&device->locks, batch->first, batch->n);
}

/* Do a run of one chore; what has changed meanwhile has called the granule's cleaning off. */
static int do_chore(struct tm_device *device, struct batch *batch, uint32_t start, uint32_t n)
{
    uint64_t first = batch->first + start;
    enum chore chore = batch->chores[start];
    int error = chore == COPY ? tm_file_write(&device->file, first, n, batch->content + (size_t)start * TM_PAGE)
                              : tm_file_zero(&device->file, first, n);
    tm_lock_run(&device->locks, first, n);
    for (uint64_t page = first; page < first + n; page++) {
        if (!tm_is_still_writing(device, page))
            continue;
        tm_stop_writing(device, page);
        if (!error && chore == COPY)
            tm_set_clean(device, page);
        else if (!error)
            tm_publish(device, page, TM_NOWHERE);
    }
    tm_unlock_run(&device->locks, first, n);
    tm_count(&device->counters->io_errors, error != 0);
    return error;
}

/* EAGAIN: there is a page that the file cannot hold. */
static int clean_batch(struct tm_device *device, struct batch *batch)
{
    int error = 0;
    take(device, batch);
    for (uint32_t i = 0, run; i < batch->n; i += run) {
        enum chore chore = batch->chores[i];
        for (run = 1; i + run < batch->n && batch->chores[i + run] == chore; run++)
            ;
        int failed = chore == IMPOSSIBLE ? EAGAIN : chore == NOTHING ? 0 : do_chore(device, batch, i, run);
        error = error ? error : failed;
    }
    return error;
}

static int clean_granule(struct tm_device *device, uint64_t granule)
{
    uint64_t page = granule * device->map.granule_pages, end = page + device->map.granule_pages;
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = 0;
    for (end = end < device->layout.pages ? end : device->layout.pages; page < end && !error; page += TM_RUN_MAX) {
        uint32_t n = end - page < TM_RUN_MAX ? (uint32_t)(end - page) : TM_RUN_MAX;
        struct tm_io io = {.first = page, .n = n};
        struct batch batch = {.first = page, .n = n, .content = bounce->pages};
        tm_io_lock(&device->locks, &io);
        error = clean_batch(device, &batch);
        tm_io_unlock(&device->locks, &io);
    }
    tm_bounce_put(&device->file, bounce);
    return error;
}

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
    int error = device->durable ? tm_file_sync(&device->file) : 0;
    tm_count(&device->counters->io_errors, error != 0);
    return error;
}
