/* Pages are written to the file over what is there: spills, writes that go through, and zeros.
 *
 * Under the run's I/O lock, and one after the other:
 * 1. mark:  each word loses what it says of the file, and gets the mark of a write that is under way (TM_WORD_WRITING).
 *           A page that is only in the file keeps, besides, what tells old and new content apart.
 * 2. write: without any other lock. Readers find what they would find without it; whoever puts or trims a page replaces its
 *           word, and with it the mark.
 * 3. tell:  words that still have the mark say what is in the file now. Where the write has failed they say what they said
 *           before, or that the page is torn, where it is not seen to be in the file still. */
#include <errno.h>

#include "device.h"

int tm_mark_and_lock(struct tm_device *device, uint64_t first, uint32_t n)
{
    bool needs_mark = !tm_is_written_through(device, first);
    for (;;) {
        int error = needs_mark ? tm_map_mark(&device->map, first, n) : 0;
        if (error)
            return error;
        tm_lock_run(&device->locks, first, n);
        if (!needs_mark || tm_map_is_marked(&device->map, first, n))
            return 0;
        tm_unlock_run(&device->locks, first, n); /* the map was cleaned in between */
    }
}

static uint64_t marked_word(uint64_t word, uint32_t crc)
{
    switch (tm_kind(word)) {
    case TM_NOWHERE:
        return TM_ZERO | TM_WORD_WRITING;
    case TM_FILE:
        return tm_overwritten_word(word, crc);
    default:
        return (word & ~TM_WORD_CLEAN) | TM_WORD_WRITING;
    }
}

static void set_word(struct tm_device *device, uint64_t page, uint64_t word)
{
    tm_look(&device->locks, page);
    tm_touch(device, page, word);
    tm_unlook(&device->locks, page);
}

void tm_start_writing(struct tm_device *device, uint64_t page)
{
    uint64_t word = tm_word(device, page);
    set_word(device, page, (word == TM_NOWHERE ? TM_ZERO : word) | TM_WORD_WRITING);
}

bool tm_is_still_writing(struct tm_device *device, uint64_t page)
{
    return tm_word(device, page) & TM_WORD_WRITING;
}

void tm_stop_writing(struct tm_device *device, uint64_t page)
{
    tm_look(&device->locks, page);
    tm_touch(device, page, tm_word(device, page) & ~TM_WORD_WRITING);
    tm_unlook(&device->locks, page);
}

void tm_set_clean(struct tm_device *device, uint64_t page)
{
    set_word(device, page, tm_word(device, page) | TM_WORD_CLEAN);
}

uint32_t tm_alike_run(const struct tm_device *device, uint64_t page, uint64_t n)
{
    bool through = tm_is_written_through(device, page);
    uint32_t run = 1;
    while (run < n && run < TM_RUN_MAX && tm_is_written_through(device, page + run) == through)
        run++;
    return run;
}

static uint32_t crc_of(const uint8_t *content, uint32_t i)
{
    static const uint8_t zeros[TM_PAGE];
    return tm_crc32c(0, content ? content + (size_t)i * TM_PAGE : zeros, TM_PAGE);
}

static int write_run(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content)
{
    int error = content ? tm_file_write(&device->file, first, n, content) : tm_file_zero(&device->file, first, n);
    if (!error && tm_is_written_through(device, first) && !device->durable)
        error = tm_file_sync(&device->file);
    tm_count(&device->counters->io_errors, error != 0);
    return error;
}

/* Find the pages that a write which failed has left as they were in the file: the checksums of a mixture do not outlive the next
 * overwrite, nor the host. */
static void find_intact(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *before, bool *intact)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    bool read = bounce && tm_file_read(&device->file, first, n, bounce->pages) == 0;
    for (uint32_t i = 0; i < n; i++)
        intact[i] = read && !(before[i] & TM_WORD_UNVERIFIED) &&
                    tm_is_intact(before[i], bounce->pages + (size_t)i * TM_PAGE);
    if (bounce)
        tm_bounce_put(&device->file, bounce);
}

static void give_up(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *before)
{
    bool intact[TM_RUN_MAX];
    find_intact(device, first, n, before, intact);
    tm_lock_run(&device->locks, first, n);
    for (uint32_t i = 0; i < n; i++) {
        if (!tm_is_still_writing(device, first + i))
            continue;
        if (tm_kind(before[i]) != TM_FILE) {
            tm_stop_writing(device, first + i);
            tm_count(&device->amiss, 1);
        } else {
            tm_publish(device, first + i, intact[i] ? before[i] : TM_TORN);
        }
    }
    tm_unlock_run(&device->locks, first, n);
}

/* The file has the page: let the index say so. */
static void tell(struct tm_device *device, uint64_t page, const uint8_t *content, uint32_t crc, bool put)
{
    unsigned generation = atomic_load_explicit(&device->generation, memory_order_relaxed);
    if (content && put && tm_put(device, page, content, true))
        return;
    tm_count(&device->counters->spills, content != NULL);
    tm_replace(device, page, content ? tm_file_word(crc, generation) : TM_NOWHERE);
}

/* Whether nobody has changed the page since its content was read and it was marked. */
static bool is_as_read(struct tm_device *device, uint64_t page)
{
    uint64_t word = tm_word(device, page);
    return tm_kind(word) == TM_FILE || word & TM_WORD_WRITING;
}

static void mark(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, uint64_t *before,
                 uint32_t *crcs)
{
    for (uint32_t i = 0; i < n; i++) {
        before[i] = tm_word(device, first + i);
        crcs[i] = crc_of(content, i);
        set_word(device, first + i, marked_word(before[i], crcs[i]));
    }
}

static int overwrite(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, bool put,
                     bool *changed)
{
    uint64_t before[TM_RUN_MAX];
    uint32_t crcs[TM_RUN_MAX];
    int error = tm_mark_and_lock(device, first, n);
    if (error)
        return error;
    bool stop = changed && (*changed = !is_as_read(device, first));
    if (!stop)
        mark(device, first, n, content, before, crcs);
    tm_unlock_run(&device->locks, first, n);
    if (stop)
        return 0;
    error = write_run(device, first, n, content);
    if (!error)
        error = tm_mark_and_lock(device, first, n); /* a cleaning that began meanwhile may have synced too early */
    if (error) {
        give_up(device, first, n, before);
        return error;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (tm_is_still_writing(device, first + i))
            tell(device, first + i, content ? content + (size_t)i * TM_PAGE : NULL, crcs[i], put);
        else if (changed)
            *changed = true;
    }
    tm_unlock_run(&device->locks, first, n);
    return 0;
}

int tm_overwrite(struct tm_device *device, uint64_t first, uint32_t n, const uint8_t *content, bool put,
                 bool *changed)
{
    uint64_t start = tm_now();
    int error = overwrite(device, first, n, content, put, changed);
    if (!error && content && !put)
        tm_took(&device->statistics->spill, start);
    return error;
}
