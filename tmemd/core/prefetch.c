/* SPDX-License-Identifier: BSD-3-Clause */
#include "prefetch.h"

#include <errno.h>

#include "bounce.h"
#include "demote.h"
#include "fetch.h"
#include "probes.h"

/* Nanoseconds from which on a miss is dear, on the mean of JUDGE_MISSES. Reads from a virtual disk
 * of this machine took 50 us one at a time, and 90 to 200 with 8 to 128 at once; from an NBD server
 * 1 ms away 1150. On that disk reads in order gained 1.3 to 2.5 times from being fetched ahead,
 * strided ones 0.7 to 1.7. */
enum { DEAR = 300000, JUDGE_MISSES = 64 };

/* What an ephemeral pool evicts at a time to make room, as a part of what it uses. */
enum { EVICT_SHARE = 64 };

static bool is_refusing(struct tm_device *device)
{
    return budget_is_refusing(&device->budget) || file_is_doubtful(&device->file) ||
           (!device->ephemeral && !budget_has_room(&device->budget));
}

static bool is_wanted(uint64_t word)
{
    return word_kind(word) == TM_FILE && !word_is_writing(word);
}

/* Of an ephemeral pool: whether it was used more than once, while it is known. */
static uint64_t again(const struct tm_device *device, uint64_t word)
{
    bool known = device->ephemeral && ages_of(state_generation(device), word) < TM_ANCIENT;
    return known ? word & TM_WORD_AGAIN : 0;
}

/* Whether there is a slot for the record of a page, clean and older than all others. */
static bool put_record(struct tm_device *device, uint64_t page, const uint8_t *content,
                       uint64_t before)
{
    uint64_t word = page_store(device, page, content);
    if (!word)
        return false;
    word = word_with_generation(word, 0) | TM_WORD_CLEAN | TM_WORD_AHEAD;
    index_set(device, page, word | again(device, before));
    stats_add(&device->counters->prefetches, 1);
    return true;
}

/* Put a page, if it is as it was when it was read and nobody is changing it. False: no slot. */
static bool put(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content)
{
    bool stored = true;
    if (!lock_try_page(&device->locks, page))
        return true;
    uint64_t now = index_word(device, page);
    if (word_same_content(now, word)) {
        if (page_is_zero(content))
            index_set(device, page, TM_NOWHERE);
        else
            stored = put_record(device, page, content, now);
    }
    unlock_pages(&device->locks, page, 1);
    return stored;
}

/* Let go of what was fetched ahead of a cache device, used once and not admitted, which is older
 * than all else: it looks through the index, so only when there must be enough of that. */
static bool make_room(struct tm_device *device)
{
    struct tm_counters *counters = device->counters;
    struct tm_filter used = {
        .min_age = TM_ANCIENT, .bounded = true, .use = TM_USED_ONCE, .spares_ahead = true};
    uint64_t hits = atomic_load(&counters->prefetch_hits), freed,
             before = atomic_load(&device->prefetch.recycled);
    if (!device->ephemeral ||
        hits - before <= atomic_load(&counters->pages_in_tmem) / EVICT_SHARE ||
        !atomic_compare_exchange_strong(&device->prefetch.recycled, &before, hits))
        return false;
    tm_demote(device, atomic_load(&counters->used) / EVICT_SHARE, used, &freed);
    return freed > 0;
}

static void put_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
                    const uint8_t *content)
{
    for (uint32_t i = 0; i < n && !is_refusing(device); i++) {
        const uint8_t *page = content + (size_t)i * TM_PAGE;
        if (!is_wanted(words[i]) || !fetch_is_right(device, first + i, words[i], page))
            continue;
        if (!put(device, first + i, words[i], page) &&
            !(make_room(device) && put(device, first + i, words[i], page)))
            break;
    }
}

/* Returns 0 or an errno; ENOSPC: nothing may take memory now. */
static int fetch(struct tm_device *device, uint64_t first, uint32_t n)
{
    uint64_t words[TM_RUN_MAX];
    uint32_t skipped = 0;
    for (uint32_t i = 0; i < n; i++)
        words[i] = index_word(device, first + i);
    while (n && !is_wanted(words[n - 1]))
        n--;
    while (skipped < n && !is_wanted(words[skipped]))
        skipped++;
    n -= skipped;
    if (!n)
        return 0;
    if (is_refusing(device))
        return ENOSPC;
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    int error = file_read(&device->file, first + skipped, n, bounce->pages);
    if (!error)
        put_run(device, first + skipped, n, words + skipped, bounce->pages);
    bounce_put(bounce);
    return error;
}

static void *work(void *argument)
{
    struct tm_device *device = argument;
    const struct ahead_run *run = NULL;
    while ((run = ahead_take(&device->prefetch.ahead, run)))
        fetch(device, run->first, run->n); /* an error is for a request to find */
    return NULL;
}

int tm_warm(struct tm_device *device, uint64_t first, uint64_t n)
{
    int error = state_has_file(device) ? 0 : ENOTSUP;
    for (uint32_t run; n && !error; first += run, n -= run) {
        run = n < TM_RUN_MAX ? (uint32_t)n : TM_RUN_MAX;
        error = fetch(device, first, run);
    }
    return error;
}

/* How many reads from the file there ever were, and how long they took. */
static uint64_t file_reads(const struct tm_device *device, uint64_t *ns)
{
    const struct tm_histogram *reads = &device->statistics->file_read;
    uint64_t n = 0;
    for (unsigned i = 0; i < TM_LATENCIES; i++)
        n += atomic_load_explicit(&reads->counts[i], memory_order_relaxed);
    *ns = atomic_load_explicit(&reads->sum_ns, memory_order_relaxed);
    return n;
}

/* Whether misses of late were dear. */
static void judge(struct tm_device *device)
{
    struct prefetch *prefetch = &device->prefetch;
    uint64_t ns, n = file_reads(device, &ns);
    if (n == prefetch->judged_reads)
        return;
    uint64_t mean = (ns - prefetch->judged_ns) / (n - prefetch->judged_reads);
    atomic_store(&device->counters->prefetching, mean > DEAR);
    prefetch->judged_reads = n;
    prefetch->judged_ns = ns;
}

void prefetch_init(struct tm_device *device, enum tm_prefetch mode)
{
    struct prefetch *prefetch = &device->prefetch;
    prefetch->mode = state_has_file(device) ? mode : TM_PREFETCH_NO;
    if (prefetch->mode != TM_PREFETCH_AUTO)
        atomic_store(&device->counters->prefetching, prefetch->mode == TM_PREFETCH_YES);
    prefetch->judged_reads = file_reads(device, &prefetch->judged_ns);
}

static void learn(struct tm_device *device, uint64_t first, uint32_t n, bool hit)
{
    struct prefetch *prefetch = &device->prefetch;
    struct trend_run runs[TREND_RUNS];
    unsigned n_runs = trend_access(&prefetch->trend, device->layout.pages, first, n, hit, runs);
    for (unsigned i = 0; i < n_runs && !is_refusing(device); i++)
        ahead_add(&prefetch->ahead, runs[i].first, runs[i].n, work, device);
}

void prefetch_learn(struct tm_device *device, uint64_t first, uint32_t n, bool hit)
{
    struct prefetch *prefetch = &device->prefetch;
    if (prefetch->mode == TM_PREFETCH_NO || pthread_mutex_trylock(&prefetch->lock) != 0)
        return;
    if (prefetch->mode == TM_PREFETCH_AUTO && !hit && ++prefetch->misses % JUDGE_MISSES == 0)
        judge(device);
    if (atomic_load_explicit(&device->counters->prefetching, memory_order_relaxed))
        learn(device, first, n, hit);
    pthread_mutex_unlock(&prefetch->lock);
}
