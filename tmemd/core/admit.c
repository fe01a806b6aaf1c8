#include "admit.h"

#include "aging.h"
#include "demote.h"
#include "probes.h"
#include "promote.h"

/* A page that is new is put as if it was last used so many generations ago. */
enum { PROBATION = 8 };

/* A generation lasts until so many pages have missed: this part of those in tmem, and at least so
 * many. */
enum { TURN_SHARE = 8, LEAST_TURN = 256 };

/* The part of the pool that one eviction makes free. */
enum { EVICT_SHARE = 64, EVICTIONS = 4 };

/* How old a page is to count that is used now: one that was used before, of late, is as young as
 * any. */
static unsigned age_of(const struct tm_device *device, uint64_t word)
{
    return ages_of(state_generation(device), word) < TM_ANCIENT ? 0 : PROBATION;
}

/* Let go of pages that are at least so old; false when there are none. */
static bool make_room(struct tm_device *device, unsigned age)
{
    uint64_t used = atomic_load(&device->counters->used), freed;
    struct tm_filter oldest = {.min_age = age ? age : 1, .bounded = true};
    tm_demote(device, used / EVICT_SHARE, oldest, &freed);
    return freed > 0;
}

/* Whether the page is as it was when it was staged; then it is put if there is a slot. */
static bool put(struct tm_device *device, const struct staged *staged, bool *stored)
{
    unsigned generation = ages_generation(state_generation(device), staged->age);
    lock_pages(&device->locks, staged->page, 1);
    bool same = word_same_content(index_word(device, staged->page), staged->word);
    *stored = same && promote_put(device, staged->page, staged->content, generation);
    unlock_pages(&device->locks, staged->page, 1);
    return same;
}

static void admit(struct tm_device *device, const struct staged *staged)
{
    bool stored = false;
    unsigned evictions = 0;
    uint64_t start = stats_now();
    while (!budget_is_refusing(&device->budget) && put(device, staged, &stored) && !stored &&
           evictions++ < EVICTIONS && make_room(device, staged->age))
        ;
    stats_add(&device->counters->puts, 1);
    stats_add(&device->counters->puts_refused, !stored);
    if (stored)
        stats_took(&device->statistics->put, start);
    PROBE(promote, device->name, staged->page, stored);
}

static void begin_generation_when_due(struct tm_device *device)
{
    uint64_t pages = atomic_load(&device->counters->pages_in_tmem) / TURN_SHARE;
    if (atomic_load(&device->turns.missed) < (pages > LEAST_TURN ? pages : LEAST_TURN))
        return;
    atomic_store(&device->turns.missed, 0);
    aging_begin_generation(device);
}

static void *work(void *argument)
{
    struct tm_device *device = argument;
    const struct staged *staged;
    while ((staged = staging_first(&device->staging))) {
        begin_generation_when_due(device);
        admit(device, staged);
        staging_remove(&device->staging);
    }
    return NULL;
}

/* Whether a page of this age may find room. */
static bool is_worth(struct tm_device *device, unsigned age)
{
    if (budget_has_room(&device->budget))
        return true;
    unsigned now = state_generation(device);
    for (unsigned old = TM_ANCIENT; old >= (age ? age : 1); old--)
        if (ages_known(&device->ages.stored[ages_generation(now, old)]))
            return true;
    return false;
}

void admit_run(struct tm_device *device, uint64_t first, uint32_t n, const uint64_t *words,
               const uint8_t *content)
{
    if (budget_is_refusing(&device->budget) || state_is_bypassed(device))
        return;
    for (uint32_t i = 0; i < n; i++) {
        if (word_kind(words[i]) != TM_FILE || word_is_writing(words[i]))
            continue;
        unsigned age = age_of(device, words[i]);
        stats_add(&device->turns.missed, 1);
        if (is_worth(device, age))
            staging_add(&device->staging, first + i, words[i], age, content + (size_t)i * TM_PAGE,
                        work, device);
    }
}
