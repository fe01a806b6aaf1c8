/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "admit.h"

#include <sys/resource.h>
#include <unistd.h>

#include "aging.h"
#include "demote.h"
#include "probes.h"
#include "promote.h"

/* What was tried beside these numbers stands in docs/decisions/0011-what-a-cache-keeps.md. LOT: of
 * pages that nothing speaks for, one of so many comes in, all or none of LOT_MISSES neighbours. */
enum { LEAST_TURN = 64, EVICT_SHARE = 64, LOT = 16, LOT_MISSES = 64, LOT_GROWTH = 8 };

/* With unlucky sizes a page needs more than one. */
enum { EVICTIONS = 4 };

/* Requests go first. */
enum { NICE = 10 };

static uint64_t pages_in_tmem(const struct tm_device *device)
{
    return atomic_load_explicit(&device->counters->pages_in_tmem, memory_order_relaxed);
}

static uint64_t share(const struct tm_device *device)
{
    return atomic_load_explicit(&device->usage.share, memory_order_relaxed);
}

/* Pages in tmem that were used once. */
static uint64_t n_once(const struct tm_device *device)
{
    uint64_t pages = pages_in_tmem(device), again = ages_known(&device->ages.n_again);
    return pages > again ? pages - again : 0;
}

/* Those of which there are too many. */
static enum tm_use victims(const struct tm_device *device)
{
    uint64_t once = n_once(device);
    return once && (once >= share(device) || once == pages_in_tmem(device)) ? TM_USED_ONCE
                                                                            : TM_USED_AGAIN;
}

/* Let go of some pages; false when there are none. */
static bool make_room(struct tm_device *device)
{
    uint64_t used = atomic_load(&device->counters->used), freed;
    tm_demote(device, used / EVICT_SHARE,
              (struct tm_filter){.bounded = true, .use = victims(device)}, &freed);
    return freed > 0;
}

/* Whether the page is as it was when it was read; then it is put if there is a slot. */
static bool put(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content,
                bool *stored)
{
    lock_pages(&device->locks, page, 1);
    uint64_t now = index_word(device, page);
    bool same = word_same_content(now, word);
    *stored = same && promote_put(device, page, content, now & TM_WORD_AGAIN);
    unlock_pages(&device->locks, page, 1);
    return same;
}

static void admit(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content,
                  unsigned evictions)
{
    bool stored = false;
    uint64_t start = stats_now();
    while (!budget_is_refusing(&device->budget) && put(device, page, word, content, &stored) &&
           !stored && evictions-- && make_room(device))
        ;
    stats_add(&device->counters->puts, 1);
    stats_add(&device->counters->puts_refused, !stored);
    if (stored)
        stats_took(&device->statistics->put, start);
    PROBE(promote, device->name, page, stored);
}

static void begin_generation_when_due(struct tm_device *device)
{
    uint64_t turn = pages_in_tmem(device) / USAGE_TURNS, begun = atomic_load(&device->usage.begun),
             missed = atomic_load(&device->usage.missed);
    turn = turn > LEAST_TURN ? turn : LEAST_TURN;
    if (missed - begun >= turn &&
        atomic_compare_exchange_strong(&device->usage.begun, &begun, missed))
        aging_begin_generation(device);
}

static void *work(void *argument)
{
    struct tm_device *device = argument;
    struct staged staged;
    setpriority(PRIO_PROCESS, (id_t)gettid(), NICE); /* Linux: of this thread alone */
    for (unsigned done = 0; staging_take(&device->staging, &staged, done); done = 1) {
        begin_generation_when_due(device);
        admit(device, staged.page, staged.word, staged.content, EVICTIONS);
    }
    return NULL;
}

/* Whether the lot falls on the page that missed as the nth. */
static bool is_lucky(const struct tm_device *device, uint64_t nth)
{
    uint64_t drawn = nth / LOT_MISSES * 40503 % 65536, pages = pages_in_tmem(device);
    return drawn < 65536 / LOT + (pages ? LOT_GROWTH * 65536 * share(device) / pages : 0);
}

/* Whether a page that was not used of late comes in. */
static bool is_admitted(struct tm_device *device, uint64_t nth)
{
    return budget_room(&device->budget) > atomic_load(&device->counters->used) / EVICT_SHARE ||
           n_once(device) < share(device) || is_lucky(device, nth);
}

/* Learn from a miss; whether the page was used before, while it is known. */
static bool is_again(struct tm_device *device, uint64_t word)
{
    unsigned age = ages_of(state_generation(device), word);
    bool known = age < TM_ANCIENT && word & TM_WORD_AGAIN,
         near = !(word & TM_WORD_AGAIN) && age < USAGE_TURNS; /* LRU would have had it */
    if ((known && age) || near)
        usage_learn(&device->usage, near, pages_in_tmem(device));
    return known || near;
}

/* Note that the page is used now; whoever changes it meanwhile knows better. */
static void note_use(struct tm_device *device, uint64_t page, uint64_t word, bool again)
{
    lock_entry(&device->locks, page);
    if (word_same_content(index_word(device, page), word))
        index_update_locked(device, page, word_used(word, state_generation(device), again));
    unlock_entry(&device->locks, page);
}

/* `fault`: where the workers are behind, this request's thread puts its page itself. */
static void offer(struct tm_device *device, uint64_t page, uint64_t word, const uint8_t *content,
                  bool fault)
{
    uint64_t nth = atomic_fetch_add(&device->usage.missed, 1);
    bool again = is_again(device, word);
    note_use(device, page, word, again);
    if ((again || is_admitted(device, nth)) &&
        !staging_add(&device->staging, page, word, content, work, device) && fault)
        admit(device, page, word, content, 0);
}

/* A page that was fetched ahead was used for the first time. It is in tmem, but older than all
 * others unless it would have been admitted. */
static void offer_ahead(struct tm_device *device, uint64_t page, uint64_t word)
{
    uint64_t nth = atomic_fetch_add(&device->usage.missed, 1), again = word & TM_WORD_AGAIN;
    if (again || is_admitted(device, nth))
        note_use(device, page, word & ~TM_WORD_AHEAD, again);
}

void admit_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
               const uint8_t *content)
{
    if (budget_is_refusing(&device->budget) || state_is_bypassed(device))
        return;
    for (uint32_t i = 0; i < n; i++)
        if (word_kind(words[i]) == TM_FILE && !word_is_writing(words[i]))
            offer(device, first + i, words[i], content + (size_t)i * TM_PAGE, n <= TM_FAULT_MAX);
        else if (word_is_ahead(words[i]))
            offer_ahead(device, first + i, words[i]);
}
