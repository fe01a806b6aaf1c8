#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

/* Where more pages than these are read at once (a guest reads 8 around the one it needs) somebody copies the device. */
enum { PROMOTE_RUN = 8 };

/* What the index said of a page before it was read. */
struct found {
    uint64_t word;
    unsigned age;
};

static int read_lost(const struct tm_device *device, uint8_t *content)
{
    if (!device->lost_zero)
        return EIO;
    memset(content, 0, TM_PAGE);
    return 0;
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

/* The page is in tmem, under its look lock. */
static int read_record(struct tm_device *device, uint64_t page, uint64_t word, unsigned age, uint8_t *content)
{
    uint64_t start = tm_now();
    if (!tm_decode(tm_record_of(device, word), word, (uint32_t)page, content)) {
        tm_count(&device->counters->bad_checksums, 1);
        return EIO;
    }
    count_get(device, age, start);
    refresh(device, page, word);
    return 0;
}

/* Read the page unless it is in the file: then EAGAIN. */
static int read_memory(struct tm_device *device, uint64_t page, uint8_t *content, struct found *found)
{
    int error = 0;
    tm_look(&device->locks, page);
    uint64_t word = tm_word(device, page);
    *found = (struct found){.word = word, .age = tm_age_of(device, word)};
    switch (tm_kind(word)) {
    case TM_NOWHERE:
    case TM_ZERO:
        memset(content, 0, TM_PAGE);
        break;
    case TM_FILE:
        error = EAGAIN;
        refresh(device, page, word);
        break;
    case TM_LOST:
        error = read_lost(device, content);
        break;
    case TM_TORN:
        tm_count(&device->counters->bad_checksums, 1);
        error = EIO;
        break;
    case TM_TMEM:
        error = read_record(device, page, word, found->age, content);
    }
    tm_unlook(&device->locks, page);
    return error;
}

int tm_read_memory(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    struct found found;
    int error = read_memory(device, page, content, &found);
    *word = found.word;
    return error;
}

static void count_file_read(struct tm_device *device, unsigned age)
{
    tm_count(&device->counters->file_reads, 1);
    tm_count(&device->statistics->file_reads_by_age[age], 1);
}

bool tm_is_intact(uint64_t word, const uint8_t *content)
{
    uint32_t crc = tm_crc32c(0, content, TM_PAGE);
    bool has_old = (word & (TM_WORD_WRITING | TM_WORD_UNVERIFIED)) == TM_WORD_WRITING;
    bool has_new = word & TM_WORD_WRITING || !(word & TM_WORD_UNVERIFIED);
    return (has_new && tm_file_crc(word) == crc) || (has_old && tm_old_crc(word) == (crc & TM_OLD_CRC));
}

static int read_file(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *buffer)
{
    uint64_t start = tm_now();
    int error = tm_file_read(&device->file, first, n, buffer);
    if (error)
        tm_count(&device->counters->io_errors, 1);
    else
        tm_took(&device->statistics->file_read, start);
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

/* Read one page from the file under its I/O lock: nothing is being written there. */
static int read_file_page(struct tm_device *device, uint64_t page, uint64_t word, uint8_t *content)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, page, 1, bounce->pages);
    if (!error && !(word & TM_WORD_UNVERIFIED) && !tm_is_intact(word, bounce->pages)) {
        tm_count(&device->counters->bad_checksums, 1);
        error = EIO;
    }
    if (!error)
        memcpy(content, bounce->pages, TM_PAGE);
    tm_bounce_put(&device->file, bounce);
    return error;
}

int tm_read_ordered(struct tm_device *device, uint64_t page, uint8_t *content, uint64_t *word)
{
    struct found found;
    int error = read_memory(device, page, content, &found);
    *word = found.word;
    if (error != EAGAIN)
        return error;
    count_file_read(device, found.age);
    return read_file_page(device, page, found.word, content);
}

static int wait_and_read(struct tm_device *device, uint64_t page, uint8_t *content)
{
    struct tm_io io = {.first = page, .n = 1};
    uint64_t word;
    tm_io_lock(&device->locks, &io);
    int error = tm_read_ordered(device, page, content, &word);
    tm_io_unlock(&device->locks, &io);
    return error;
}

/* Whether what was read without a lock is what the page was then. */
static bool is_right(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content)
{
    bool is_unknown = (word & (TM_WORD_WRITING | TM_WORD_UNVERIFIED)) == TM_WORD_UNVERIFIED;
    return is_unknown ? tm_same_content(tm_word(device, page), word) : tm_is_intact(word, content);
}

/* Read a run of pages that the index says are in the file. It takes no lock, so a page may be overwritten meanwhile: then it is
 * read again after that. */
static int read_file_run(struct tm_device *device, uint64_t first, uint32_t n, struct found *found, uint8_t *content)
{
    struct tm_bounce *bounce = tm_bounce_get(&device->file);
    if (!bounce)
        return ENOMEM;
    int error = read_file(device, first, n, bounce->pages);
    for (uint32_t i = 0; i < n && !error; i++) {
        const uint8_t *page = bounce->pages + (size_t)i * TM_PAGE;
        if (is_right(device, first + i, found[i].word, page)) {
            count_file_read(device, found[i].age);
            memcpy(content + (size_t)i * TM_PAGE, page, TM_PAGE);
        } else {
            error = wait_and_read(device, first + i, content + (size_t)i * TM_PAGE);
            found[i].word |= TM_WORD_WRITING; /* what was found is not what was read: it is not promoted */
        }
    }
    tm_bounce_put(&device->file, bounce);
    return error;
}

/* Put pages again that were just read from the file and are in use, where there is room to spare. */
static void promote(struct tm_device *device, uint64_t first, uint32_t n, const struct found *found,
                    const uint8_t *content)
{
    const uint64_t doubts = TM_WORD_WRITING | TM_WORD_UNVERIFIED;
    for (uint32_t i = 0; i < n; i++)
        if (tm_kind(found[i].word) == TM_FILE && !(found[i].word & doubts) && found[i].age < TM_PROMOTE_AGE &&
            tm_has_room(&device->budget))
            tm_promote(device, first + i, content + (size_t)i * TM_PAGE, found[i].word);
}

/* Read n <= TM_RUN_MAX whole pages; neighbours in the file come in one read. */
static int read_pages(struct tm_device *device, uint64_t first, uint32_t n, uint8_t *content)
{
    struct found found[TM_RUN_MAX];
    uint32_t run = 0; /* pages before this one that wait to be read from the file */
    int error = 0;
    for (uint32_t i = 0; i <= n && !error; i++) {
        int here = i < n ? read_memory(device, first + i, content + (size_t)i * TM_PAGE, &found[i]) : 0;
        if (here == EAGAIN) {
            run++;
            continue;
        }
        if (run && !here)
            here = read_file_run(device, first + i - run, run, found + i - run, content + (size_t)(i - run) * TM_PAGE);
        run = 0;
        error = here;
    }
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

int tm_cache(struct tm_device *device, uint64_t count, uint64_t offset)
{
    uint8_t content[TM_PAGE];
    struct found found;
    uint64_t last = (offset + count + TM_PAGE - 1) / TM_PAGE;
    for (uint64_t page = offset / TM_PAGE; page < last && !tm_refusing(&device->budget); page++)
        if (read_memory(device, page, content, &found) == EAGAIN &&
            (read_file_run(device, page, 1, &found, content) != 0 || !tm_promote(device, page, content, found.word)))
            break; /* a hint: what cannot be brought in stays where it is */
    return 0;
}
