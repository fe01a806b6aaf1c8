#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

enum outcome { DONE, IN_FILE, FAILED };

/* Where more pages than these are read at once (a guest reads 8 around the one it needs) somebody copies the device. */
enum { PROMOTE_RUN = 8 };

/* What the index said of a page before it was read. */
struct found {
    uint64_t word;
    unsigned age;
};

/* A lost page. */
static enum outcome read_lost(const struct tm_device *device, uint8_t *content)
{
    if (!device->lost_zero)
        return FAILED;
    memset(content, 0, TM_PAGE);
    return DONE;
}

/* Remember that the page was used, but only once in a generation: the word need not change for every read. */
static void refresh(struct tm_device *device, uint64_t page, uint64_t word)
{
    unsigned generation = atomic_load_explicit(&device->generation, memory_order_relaxed);
    if (tm_generation(word) != generation)
        tm_touch(device, page, tm_with_generation(word, generation));
}

static void count_get(struct tm_device *device, unsigned age, uint64_t start)
{
    tm_count(&device->counters->gets, 1);
    tm_count(&device->statistics->gets_by_age[age], 1);
    tm_took(&device->statistics->get, start);
}

/* Read the page if it is not in the file. */
static enum outcome read_memory(struct tm_device *device, uint64_t page, uint8_t *content, struct found *found)
{
    enum outcome outcome = DONE;
    uint64_t start = tm_now();
    tm_look(&device->locks, page);
    uint64_t word = tm_word(device, page);
    *found = (struct found){.word = word, .age = tm_age_of(device, word)};
    switch (tm_kind(word)) {
    case TM_NOWHERE:
    case TM_ZERO:
        memset(content, 0, TM_PAGE);
        break;
    case TM_FILE:
        outcome = IN_FILE;
        tm_count(&device->statistics->file_reads_by_age[found->age], 1);
        refresh(device, page, word);
        break;
    case TM_LOST:
        outcome = read_lost(device, content);
        break;
    case TM_TMEM:
        if (tm_decode(tm_record_of(device, word), word, (uint32_t)page, content)) {
            count_get(device, found->age, start);
            refresh(device, page, word);
        } else {
            tm_count(&device->counters->bad_checksums, 1);
            outcome = FAILED;
        }
    }
    tm_unlook(&device->locks, page);
    return outcome;
}

static bool is_intact(uint64_t word, const uint8_t *content)
{
    return word & TM_WORD_FLAG || tm_file_crc(word) == tm_crc32c(0, content, TM_PAGE);
}

static int read_file(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *buffer)
{
    uint64_t start = tm_now();
    int error = tm_file_read(&device->file, first, n, buffer);
    tm_count(&device->counters->file_reads, n);
    if (error)
        tm_count(&device->counters->io_errors, 1);
    else
        tm_took(&device->statistics->file_read, start);
    return error;
}

/* Read one page from the file, its change lock held: nothing is being written there. */
static int read_file_locked(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, page, 1, bounce->pages);
    if (!error && !is_intact(word, bounce->pages)) {
        tm_count(&device->counters->bad_checksums, 1);
        error = EIO;
    }
    if (!error)
        memcpy(content, bounce->pages, TM_PAGE);
    tm_bounce_put(&device->file, bounce);
    return error;
}

bool tm_copy_out(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    tm_look(&device->locks, page);
    *word = tm_word(device, page);
    bool stored = tm_kind(*word) == TM_TMEM;
    bool whole = stored && tm_decode(tm_record_of(device, *word), *word, (uint32_t)page, content);
    tm_unlook(&device->locks, page);
    tm_count(&device->counters->bad_checksums, stored && !whole);
    return whole;
}

int tm_read_locked(struct tm_device *device, uint64_t page, uint8_t *content)
{
    struct found found;
    switch (read_memory(device, page, content, &found)) {
    case DONE:
        return 0;
    case IN_FILE:
        return read_file_locked(device, page, found.word, content);
    case FAILED:
        break;
    }
    return EIO;
}

static int read_ordered(struct tm_device *device, uint64_t page, uint8_t *content)
{
    tm_lock_run(&device->locks, page, 1);
    int error = tm_read_locked(device, page, content);
    tm_unlock_run(&device->locks, page, 1);
    return error;
}

/* Whether what was read without a lock is what the word promised. */
static bool is_still(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content)
{
    if (!(word & TM_WORD_FLAG))
        return is_intact(word, content);
    if (tm_file_crc(word) == TM_IN_FLUX)
        return false;
    return tm_same_content(tm_peek(device, page), word);
}

/* Read a run of pages that the index says are in the file. It takes no lock, so a page may change meanwhile: then it is
 * read again in its turn. */
static int read_file_run(struct tm_device *device, uint64_t first, uint32_t n, struct found *found, uint8_t *content)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, first, n, bounce->pages);
    for (uint32_t i = 0; i < n && !error; i++) {
        const uint8_t *page = bounce->pages + (size_t)i * TM_PAGE;
        if (is_still(device, first + i, found[i].word, page)) {
            memcpy(content + (size_t)i * TM_PAGE, page, TM_PAGE);
        } else {
            error = read_ordered(device, first + i, content + (size_t)i * TM_PAGE);
            found[i].age = TM_ANCIENT; /* what was found is not what was read */
        }
    }
    tm_bounce_put(&device->file, bounce);
    return error;
}

/* Put pages again that were just read from the file and are in use. */
static void promote(struct tm_device *device, uint64_t first, uint32_t n, const struct found *found,
                    const uint8_t *content)
{
    for (uint32_t i = 0; i < n; i++)
        if (tm_kind(found[i].word) == TM_FILE && !(found[i].word & TM_WORD_FLAG) && found[i].age < TM_PROMOTE_AGE)
            tm_promote(device, first + i, content + (size_t)i * TM_PAGE, found[i].word);
}

/* Read n <= TM_RUN_MAX whole pages; neighbours in the file come in one read. */
static int read_pages(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    struct found found[TM_RUN_MAX];
    uint32_t run = 0; /* pages before this one that wait to be read from the file */
    int error = 0;
    for (uint32_t i = 0; i < n && !error; i++) {
        enum outcome outcome = read_memory(device, first + i, content + (size_t)i * TM_PAGE, &found[i]);
        if (outcome == IN_FILE) {
            run++;
            continue;
        }
        error = outcome == FAILED ? EIO : 0;
        if (run && !error)
            error = read_file_run(device, first + i - run, run, found + i - run, content + (size_t)(i - run) * TM_PAGE);
        run = 0;
    }
    if (run && !error)
        error = read_file_run(device, first + n - run, run, found + n - run, content + (size_t)(n - run) * TM_PAGE);
    if (!error && n <= PROMOTE_RUN)
        promote(device, first, n, found, content);
    return error;
}

/* Read part of one page. */
static int read_part(struct tm_device *device, uint64_t page, uint32_t from, uint32_t count, uint8_t *buffer)
{
    uint8_t content[TM_PAGE];
    int error = read_pages(device, page, 1, content);
    if (!error)
        memcpy(buffer, content + from, count);
    return error;
}

int tm_read(struct tm_device *device, void *buffer, uint32_t count, uint64_t offset)
{
    uint8_t *to = buffer;
    int error = 0;
    tm_count(&device->counters->reads, 1);
    while (count && !error) {
        uint64_t page = offset / TM_PAGE;
        uint32_t from = (uint32_t)(offset % TM_PAGE), length = TM_PAGE - from;
        if (from || count < TM_PAGE) {
            length = length < count ? length : count;
            error = read_part(device, page, from, length, to);
        } else {
            uint32_t n = count / TM_PAGE < TM_RUN_MAX ? count / TM_PAGE : TM_RUN_MAX;
            length = n * TM_PAGE;
            error = read_pages(device, page, n, to);
        }
        to += length;
        offset += length;
        count -= length;
    }
    return error ? EIO : 0;
}
