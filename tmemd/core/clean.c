/* The map is cleaned: the file gets the zeros that it lacks, and the bits are cleared of all granules in which the file then holds
 * everything, durably, and nobody has changed a page meanwhile. */
#include <errno.h>

#include "device.h"

static uint64_t granule_end(const struct tm_device *device, uint64_t granule)
{
    uint64_t end = (granule + 1) * device->map.granule_pages;
    return end < device->layout.pages ? end : device->layout.pages;
}

static bool needs_zeros(const struct tm_device *device, uint64_t word)
{
    return tm_kind(word) == TM_ZERO || (tm_kind(word) == TM_LOST && device->lost_zero);
}

/* Whether a write to the file was killed: the page is what it was, or what it was to be. */
static bool is_unsettled(uint64_t word) { return tm_kind(word) == TM_FILE && word & TM_WORD_WRITING; }

/* Whether the file holds the page. It cannot say 'lost'; only the map can. */
static bool is_in_file(const struct tm_device *device, uint64_t word)
{
    return word == TM_NOWHERE || (tm_kind(word) == TM_FILE && !is_unsettled(word)) ||
           (tm_kind(word) == TM_TMEM && tm_is_clean(device, word));
}

/* Find out which of the two the page is. One that is damaged stays as it is. */
static void settle(struct tm_device *device, uint64_t page)
{
    uint8_t content[TM_PAGE];
    struct tm_io io = {.first = page, .n = 1};
    uint64_t word;
    tm_io_lock(&device->locks, &io);
    bool known = tm_read_ordered(device, page, content, &word) == 0;
    tm_lock_run(&device->locks, page, 1);
    if (known && is_unsettled(word) && tm_same_content(tm_word(device, page), word))
        tm_publish(device, page, tm_file_word(tm_crc32c(0, content, TM_PAGE), tm_generation(word)));
    tm_unlock_run(&device->locks, page, 1);
    tm_io_unlock(&device->locks, &io);
}

/* Mark neighbours from `page` on whose zeros the file lacks, under their I/O lock; returns how many there are. */
static uint32_t mark(struct tm_device *device, uint64_t page, uint32_t most)
{
    uint32_t n = 0;
    tm_lock_run(&device->locks, page, most);
    for (; n < most && needs_zeros(device, tm_word(device, page + n)); n++)
        tm_start_writing(device, page + n);
    tm_unlock_run(&device->locks, page, most);
    return n;
}

/* Write zeros to the file from `page` on, as far as it lacks them; *n is how far it got. Who has changed a page meanwhile has
 * taken its mark away. */
static int zero_run(struct tm_device *device, uint64_t page, uint32_t *n)
{
    struct tm_io io = {.first = page, .n = *n};
    tm_io_lock(&device->locks, &io);
    *n = mark(device, page, *n);
    int error = *n ? tm_file_zero(&device->file, page, *n) : 0;
    tm_lock_run(&device->locks, page, *n);
    for (uint64_t end = page + *n; page < end; page++)
        if (tm_is_still_writing(device, page))
            tm_publish(device, page, error ? tm_word(device, page) & ~TM_WORD_WRITING : TM_NOWHERE);
    tm_unlock_run(&device->locks, io.first, *n);
    tm_io_unlock(&device->locks, &io);
    tm_count(&device->counters->io_errors, error != 0);
    return error;
}

static int write_zeros(struct tm_device *device, uint64_t granule)
{
    uint64_t page = granule * device->map.granule_pages, end = granule_end(device, granule);
    int error = 0;
    while (page < end && !error) {
        uint32_t n = end - page < TM_RUN_MAX ? (uint32_t)(end - page) : TM_RUN_MAX;
        uint64_t word = tm_word(device, page);
        if (is_unsettled(word))
            settle(device, page);
        if (needs_zeros(device, word))
            error = zero_run(device, page, &n);
        page += needs_zeros(device, word) && n ? n : 1;
    }
    return error;
}

static void keep_unless_in_file(struct tm_device *device, uint64_t granule)
{
    uint64_t page = granule * device->map.granule_pages, end = granule_end(device, granule);
    while (page < end && is_in_file(device, tm_word(device, page)))
        page++;
    if (page < end)
        tm_map_keep(&device->map, granule);
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
    int error = 0;
    for (uint64_t granule = 0; granule < device->map.n && !error; granule++)
        if (tm_map_is_set(&device->map, granule))
            error = write_zeros(device, granule);
    if (error)
        return error;
    tm_map_begin_cleaning(&device->map);
    tm_wait_for_changes(device);
    for (uint64_t granule = 0; granule < device->map.n; granule++)
        keep_unless_in_file(device, granule);
    error = tm_file_sync(&device->file);
    for (uint64_t granule = 0; error && granule < device->map.n; granule++)
        tm_map_keep(&device->map, granule);
    return error ? error : tm_map_finish_cleaning(&device->map);
}

/* Whether the page is written through, and the file may hold something else. */
static bool is_amiss(const struct tm_device *device, uint64_t page)
{
    uint64_t word = tm_word(device, page);
    return tm_is_written_through(device, page) &&
           (tm_kind(word) == TM_ZERO || (tm_kind(word) == TM_TMEM && !(word & TM_WORD_CLEAN)));
}

/* Under the page's I/O lock, under which alone it changes. */
static int mend(struct tm_device *device, uint64_t page, uint8_t *content)
{
    uint64_t word;
    if (!is_amiss(device, page))
        return 0;
    if (tm_kind(tm_word(device, page)) == TM_ZERO)
        return tm_overwrite(device, page, 1, NULL, false, NULL);
    if (!tm_copy_out(device, page, content, &word))
        return 0; /* damaged: an error whatever the file holds */
    return tm_overwrite(device, page, 1, content, true, NULL);
}

static int mend_all(struct tm_device *device)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = 0;
    for (uint64_t page = 0; page < device->layout.pages && !error; page++) {
        struct tm_io io = {.first = page, .n = 1};
        if (!is_amiss(device, page))
            continue;
        tm_io_lock(&device->locks, &io);
        error = mend(device, page, bounce->pages);
        tm_io_unlock(&device->locks, &io);
    }
    tm_bounce_put(&device->file, bounce);
    return error ? error : tm_file_sync(&device->file);
}

int tm_mend(struct tm_device *device)
{
    pthread_mutex_lock(&device->demote_lock);
    uint64_t amiss = atomic_load(&device->amiss);
    int error = amiss ? mend_all(device) : 0;
    if (!error)
        atomic_fetch_sub(&device->amiss, amiss);
    pthread_mutex_unlock(&device->demote_lock);
    return error;
}

int tm_mark_dirty(struct tm_device *device)
{
    int error = 0;
    for (uint64_t page = 0; page < device->layout.pages && !error; page++)
        if (!is_in_file(device, tm_word(device, page)) && !tm_is_written_through(device, page))
            error = tm_map_mark(&device->map, page, 1);
    return error;
}

int tm_flush(struct tm_device *device)
{
    tm_count(&device->counters->flushes, 1);
    int error = atomic_load(&device->amiss) ? tm_mend(device) : 0;
    if (!device->durable)
        return 0;
    if (!error)
        error = tm_file_sync(&device->file);
    tm_count(&device->counters->io_errors, error != 0);
    return error;
}
