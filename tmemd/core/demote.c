/* SPDX-License-Identifier: BSD-3-Clause */
/* Pages are moved out of tmem: the oldest go first, those that the file lacks are written to it
 * before. Threads share a demotion; each run of neighbours is moved under its I/O lock, with page
 * locks held for a moment at either end. */
#include "demote.h"

#include <errno.h>
#include <string.h>

#include "bounce.h"
#include "crc32c.h"
#include "overwrite.h"
#include "probes.h"
#include "stretch.h"
#include "thread.h"

/* A demotion takes one more thread for each of these bytes of slots, up to HELPERS besides its own:
 * pages that lie scattered are single writes, and a disk does several at once. Seconds per GiB
 * given back, cold pages side by side and scattered (benchmarks/takeback.py, two cores, a disk of
 * 15000 writes a second at depth 1 and 61000 at depth 8): 10 and 48 without helpers, 5.3 and 28
 * with one, 3.0 and 16 with three, 2.8 to 3.0 and 12 to 14 with seven. */
enum { HELPER_BYTES = 512 << 10, HELPERS = 7 };

/* Helpers of all devices that this process serves, and the most there may be: where many shrink at
 * once the disk has enough to do, and each takes a bounce buffer. */
static _Atomic unsigned all_helpers;
enum { ALL_HELPERS = 16 };

/* A demotion: 1. the sums by age tell down to which age pages go; 2. threads take blocks, from
 * where the last demotion ended; 3. of each run of neighbours, under its I/O lock, clean pages
 * leave and the others are marked, written, and leave; 4. nothing could leave: once more for pages
 * of any age; 5. still not enough: back off until the next generation. */
struct demotion {
    struct tm_device *device;
    struct tm_filter choice;
    bool is_away;           /* the file's store: only clean pages can leave without waiting */
    uint64_t bytes;         /* of slots to come free */
    unsigned age;           /* down to which pages go */
    uint64_t hand;          /* the block it begins with */
    _Atomic uint64_t begun; /* blocks */
    _Atomic uint64_t freed;
    _Atomic int error;
};

/* The most that counters->demotion_writes may become. Pages of an ephemeral pool go without a
 * write. */
static uint64_t bound_of(const struct demotion *demotion)
{
    struct tm_device *device = demotion->device;
    bool bounded = demotion->choice.bounded && !device->ephemeral;
    return !bounded ? UINT64_MAX : demotion->is_away ? 0 : budget_demotion_bound(&device->budget);
}

static bool is_chosen(const struct demotion *demotion, uint64_t word)
{
    const struct tm_device *device = demotion->device;
    if (word_kind(word) != TM_TMEM || ages_of(state_generation(device), word) < demotion->age)
        return false;
    if (demotion->choice.raw_only && word_encoding(word) != TM_RAW)
        return false;
    if (demotion->choice.spares_ahead && word_is_ahead(word))
        return false;
    enum tm_use use = word & TM_WORD_AGAIN ? TM_USED_AGAIN : TM_USED_ONCE;
    if (demotion->choice.use && demotion->choice.use != use)
        return false;
    if (state_is_clean(device, word))
        return !demotion->choice.keep;
    return !device->ephemeral && atomic_load_explicit(&device->counters->demotion_writes,
                                                      memory_order_relaxed) < bound_of(demotion);
}

static bool is_zeros(uint64_t word)
{
    return word_kind(word) == TM_ZERO || word_kind(word) == TM_NOWHERE;
}

/* Count up to n pages as written, as many as the bound allows. */
static uint32_t count_writes(const struct demotion *demotion, uint32_t n)
{
    _Atomic uint64_t *written = &demotion->device->counters->demotion_writes;
    uint64_t bound = bound_of(demotion), now = atomic_load(written), granted;
    do
        granted = now >= bound ? 0 : bound - now < n ? bound - now : n;
    while (!atomic_compare_exchange_weak(written, &now, now + granted));
    return (uint32_t)granted;
}

/* Neighbours on their way to the file, under their I/O lock. */
struct batch {
    uint64_t first;
    uint32_t n;
    uint8_t *content;
    bool taken[TM_RUN_MAX]; /* those that must be written first; they are marked */
};

/* The file has the page, and it leaves tmem. Under its page lock. */
static void leave(struct demotion *demotion, uint64_t page, uint32_t crc)
{
    struct tm_device *device = demotion->device;
    uint64_t before = index_word(device, page);
    uint64_t after = state_file_word(device, crc, word_generation(before));
    uint64_t word = index_set(device, page, after | (before & TM_WORD_AGAIN));
    stats_add(&device->counters->demotions, 1);
    atomic_fetch_add(&demotion->freed, word_slot_size(word_length(word)));
    PROBE(demote, device->name, page, word_slot_size(word_length(word)));
}

/* Let go of pages that are clean, and mark the others that are chosen, and zeros: these are written
 * along. */
static void take(struct demotion *demotion, struct batch *batch)
{
    struct tm_device *device = demotion->device;
    for (uint32_t i = 0; i < batch->n; i++) {
        uint64_t page = batch->first + i, word;
        uint8_t *content = batch->content + (size_t)i * TM_PAGE;
        lock_pages(&device->locks, page,
                   1); /* one by one: decoding takes 3 us, for which others wait */
        bool chosen = page_copy_out(device, page, content, &word) && is_chosen(demotion, word);
        if (is_zeros(word))
            memset(content, 0, TM_PAGE);
        batch->taken[i] = is_zeros(word) || (chosen && !state_is_clean(device, word));
        if (batch->taken[i] && word != TM_NOWHERE)
            index_update(device, page, word_writing(word, 0));
        else if (chosen)
            leave(demotion, page, crc32c(0, content, TM_PAGE));
        unlock_pages(&device->locks, page, 1);
    }
}

/* What was written leaves tmem. What was read meanwhile stays, clean; what has changed is dirty. */
static void finish(struct demotion *demotion, struct batch *batch, uint32_t start, uint32_t n,
                   bool written)
{
    struct tm_device *device = demotion->device;
    for (uint32_t i = start; i < start + n; i++) {
        uint64_t page = batch->first + i, word = index_word(device, page);
        if (!word_is_writing(word))
            continue;
        bool leaves = !demotion->choice.keep && word_kind(word) == TM_TMEM &&
                      ages_of(state_generation(device), word) >= demotion->age;
        if (written && leaves)
            leave(demotion, page, crc32c(0, batch->content + (size_t)i * TM_PAGE, TM_PAGE));
        else
            index_update(device, page, written ? word_written(word) : word & ~TM_WORD_WRITING);
    }
}

/* Write n taken pages of a batch, as many as the bound allows. */
static int move_to_file(struct demotion *demotion, struct batch *batch, uint32_t start, uint32_t n)
{
    struct tm_device *device = demotion->device;
    uint64_t first = batch->first + start;
    uint32_t granted = count_writes(demotion, n);
    bool through = state_any_written_through(device, first, granted);
    int error = granted ? file_write(&device->file, first, granted,
                                     batch->content + (size_t)start * TM_PAGE, through)
                        : 0;
    bool locked = !error && overwrite_lock_pages(device, first, n) == 0;
    if (!locked) {
        stats_sub(&device->counters->demotion_writes, granted);
        stats_add(&device->counters->io_errors, 1);
        lock_pages(&device->locks, first, n);
    }
    finish(demotion, batch, start, granted, locked);
    finish(demotion, batch, start + granted, n - granted, false);
    unlock_pages(&device->locks, first, n);
    return locked ? 0 : error ? error : EIO;
}

static int demote_batch(struct demotion *demotion, struct batch *batch)
{
    int error = 0;
    take(demotion, batch);
    for (uint32_t i = 0, run; i < batch->n; i += run) {
        for (run = 1; i + run < batch->n && batch->taken[i + run] == batch->taken[i]; run++)
            ;
        int failed = batch->taken[i] ? move_to_file(demotion, batch, i, run) : 0;
        error = error ? error : failed;
    }
    return error;
}

/* Pages of an ephemeral pool just go: the file holds what they hold. */
static int evict_run(struct demotion *demotion, uint64_t first, uint32_t n)
{
    struct tm_device *device = demotion->device;
    for (uint64_t page = first; page < first + n; page++) {
        lock_pages(&device->locks, page, 1);
        if (is_chosen(demotion, index_word(device, page)))
            leave(demotion, page, 0);
        unlock_pages(&device->locks, page, 1);
    }
    return 0;
}

static int demote_run(struct demotion *demotion, uint64_t first, uint32_t n)
{
    struct tm_device *device = demotion->device;
    struct io_range io = {.first = first, .n = n};
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    struct batch batch = {.first = first, .n = n, .content = bounce->pages};
    lock_io(&device->locks, &io);
    int error = demote_batch(demotion, &batch);
    unlock_io(&device->locks, &io);
    bounce_put(bounce);
    return error;
}

/* Upper bound on the bytes of this age that may be demoted. */
static uint64_t candidates(const struct demotion *demotion, unsigned age, bool may_write)
{
    const struct backoff *backoff = &demotion->device->backoff;
    const struct ages *ages = &demotion->device->ages;
    unsigned then = ages_generation(state_generation(demotion->device), age);
    uint64_t bytes = ages_known(&(demotion->choice.raw_only ? ages->raw : ages->stored)[then]);
    uint64_t again = ages_known(&ages->again[then]);
    if (demotion->choice.use)
        return demotion->choice.use == TM_USED_AGAIN ? again : bytes > again ? bytes - again : 0;
    if (demotion->choice.bounded && age >= backoff->age && backoff->bound == bound_of(demotion))
        return 0;
    uint64_t clean = file_is_doubtful(&demotion->device->file) ? 0 : ages_known(&ages->clean[then]);
    return may_write || bytes < clean ? bytes : clean;
}

/* Find the age down to which pages go; false when none can. An unbounded demotion always looks. */
static bool find_age(struct demotion *demotion)
{
    uint64_t sum = 0;
    bool may_write = atomic_load(&demotion->device->counters->demotion_writes) < bound_of(demotion);
    demotion->age = demotion->choice.min_age;
    for (unsigned age = TM_GENERATIONS;
         age-- > demotion->choice.min_age && sum < demotion->bytes;) {
        sum += candidates(demotion, age, may_write);
        demotion->age = age;
    }
    return sum > 0 || !demotion->choice.bounded;
}

static bool is_done(const struct demotion *demotion)
{
    return atomic_load(&demotion->freed) >= demotion->bytes || atomic_load(&demotion->error);
}

/* How many of the n pages are moved together: those that are chosen, and a few zeros between. */
static uint32_t find_run(const struct demotion *demotion, const uint64_t *words, uint32_t n)
{
    uint32_t run = 0;
    for (uint32_t i = 0; i < n && i < TM_RUN_MAX; i++)
        if (is_chosen(demotion, words[i]))
            run = i + 1;
        else if (!is_zeros(words[i]) || !run || i - run == STRETCH_GAP)
            break;
    return run;
}

/* Demote what is old enough in one block, in runs of neighbours. */
static int demote_block(struct demotion *demotion, uint64_t block)
{
    struct tm_device *device = demotion->device;
    uint64_t words[TM_BLOCK_PAGES], first = block * TM_BLOCK_PAGES;
    int error = 0;
    uint32_t n = index_block_pages(device, block);
    for (uint32_t i = 0; i < n; i++)
        words[i] = index_word(device, first + i);
    for (uint32_t i = 0, run; i < n && !error && !is_done(demotion); i += run ? run : 1) {
        run = find_run(demotion, words + i, n - i);
        if (run)
            error = (device->ephemeral ? evict_run : demote_run)(demotion, first + i, run);
        else if (demotion->choice.zeros)
            error = overwrite_zeros(device, first + i, first + n, &run);
    }
    return error;
}

static void *work(void *argument)
{
    struct demotion *demotion = argument;
    uint64_t blocks = demotion->device->layout.blocks, i;
    while (!is_done(demotion) && (i = atomic_fetch_add(&demotion->begun, 1)) < blocks) {
        int error = demote_block(demotion, (demotion->hand + i) % blocks);
        if (error)
            atomic_store(&demotion->error, error);
    }
    return NULL;
}

/* Start one more helper, if there may be one. */
static bool start_helper(struct demotion *demotion, pthread_t *helper)
{
    bool started =
        atomic_fetch_add(&all_helpers, 1) < ALL_HELPERS && thread_start(helper, work, demotion);
    if (!started)
        atomic_fetch_sub(&all_helpers, 1);
    return started;
}

static unsigned start_helpers(struct demotion *demotion, pthread_t *helpers)
{
    uint64_t wanted = demotion->device->ephemeral ? 0 : demotion->bytes / HELPER_BYTES;
    unsigned n = 0;
    while (n < HELPERS && n < wanted && start_helper(demotion, &helpers[n]))
        n++;
    return n;
}

static void join_helpers(const pthread_t *helpers, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        pthread_join(helpers[i], NULL);
    atomic_fetch_sub(&all_helpers, n);
}

/* Where the next demotion begins: the last blocks may have more, unless one cannot be written. */
static uint64_t next_hand(const struct demotion *demotion, unsigned helpers)
{
    uint64_t begun = atomic_load(&demotion->begun),
             back = atomic_load(&demotion->error) ? 0 : helpers + 1;
    return (demotion->hand + (begun > back ? begun - back : 0)) % demotion->device->layout.blocks;
}

/* A full round did not free enough: skip these ages until the next generation. Of age 0 there may
 * be more at any time. */
static void back_off(const struct demotion *demotion, uint64_t bound)
{
    if (!is_done(demotion) && demotion->choice.bounded && !demotion->choice.raw_only &&
        !demotion->choice.use)
        demotion->device->backoff =
            (struct backoff){.age = demotion->age ? demotion->age : 1, .bound = bound};
}

/* Once through the blocks, or until it is done. */
static void go_round(struct demotion *demotion)
{
    struct tm_device *device = demotion->device;
    pthread_t helpers[HELPERS];
    demotion->hand = device->hand;
    atomic_store(&demotion->begun, 0);
    unsigned n = start_helpers(demotion, helpers);
    work(demotion);
    join_helpers(helpers, n);
    bounce_release_spare(); /* whole runs went through them */
    device->hand = next_hand(demotion, n);
}

/* Whether nothing of the chosen ages could be moved, such as damaged records, so that younger pages
 * must go. */
static bool needs_younger(const struct demotion *demotion)
{
    return !demotion->choice.bounded && demotion->age > demotion->choice.min_age &&
           !atomic_load(&demotion->freed) && !atomic_load(&demotion->error);
}

int demote_locked(struct tm_device *device, uint64_t bytes, struct tm_filter choice,
                  uint64_t *freed)
{
    struct demotion demotion = {
        .device = device, .choice = choice, .bytes = bytes, .is_away = file_is_away(&device->file)};
    uint64_t bound = bound_of(&demotion);
    *freed = 0;
    if (!bytes || !find_age(&demotion))
        return 0;
    go_round(&demotion);
    if (needs_younger(&demotion)) {
        demotion.age = choice.min_age;
        go_round(&demotion);
    }
    back_off(&demotion, bound);
    *freed = atomic_load(&demotion.freed);
    return atomic_load(&demotion.error);
}

int tm_demote(struct tm_device *device, uint64_t bytes, struct tm_filter choice, uint64_t *freed)
{
    *freed = 0;
    if (!state_has_file(device))
        return ENOTSUP;
    pthread_mutex_lock(&device->demote_lock);
    int error = demote_locked(device, bytes, choice, freed);
    pthread_mutex_unlock(&device->demote_lock);
    return error;
}
