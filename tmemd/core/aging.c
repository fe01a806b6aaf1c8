/* SPDX-License-Identifier: BSD-3-Clause */
/* Under demote_lock; words change under their entry lock. */
#include "aging.h"

#include "index.h"

static bool is_of(uint64_t word, unsigned generation)
{
    return (word_kind(word) == TM_TMEM || word_kind(word) == TM_FILE) &&
           word_generation(word) == generation;
}

/* The page becomes ancient, if it still is of this generation. */
static void forget_page(struct tm_device *device, uint64_t page, unsigned generation)
{
    lock_entry(&device->locks, page);
    uint64_t word = index_word(device, page);
    if (is_of(word, generation))
        index_update_locked(device, page, word_with_generation(word, 0));
    unlock_entry(&device->locks, page);
}

/* Before a generation's number is used again: the oldest pages may not become the youngest. */
static void forget_generation(struct tm_device *device, unsigned generation)
{
    if (!atomic_load(&device->ages.stored[generation]) &&
        !atomic_load(&device->ages.in_file[generation]))
        return; /* the usual case on an idle device */
    for (uint64_t page = 0; page < device->layout.pages; page++)
        if (is_of(index_word(device, page), generation))
            forget_page(device, page, generation);
}

/* Of an ephemeral pool: say how long ago each generation ended. */
static void note_ages(struct tm_device *device)
{
    struct turns *turns = &device->turns;
    unsigned now = atomic_load(&device->generation);
    for (unsigned generation = 0; generation < TM_GENERATIONS; generation++) {
        uint64_t age = generation == now ? 0
                       : generation      ? turns->ticks - turns->ended[generation]
                                         : TM_ANCIENT;
        atomic_store(&turns->age[generation], age < TM_ANCIENT ? (uint8_t)age : TM_ANCIENT);
    }
}

static void begin(struct tm_device *device)
{
    unsigned now = atomic_load(&device->generation), next = now % TM_ANCIENT + 1;
    forget_generation(device, next);
    atomic_store(&device->statistics->generation,
                 next); /* first: after a crash no page may seem younger than now */
    atomic_store(&device->generation, next);
    device->turns.ended[now] = device->turns.ticks;
    device->backoff.age = TM_GENERATIONS;
}

void aging_init(struct tm_device *device)
{
    uint64_t last = atomic_load(&device->statistics->generation);
    atomic_store(&device->generation, last >= 1 && last <= TM_ANCIENT ? (unsigned)last : 1);
    device->backoff.age = TM_GENERATIONS;
    note_ages(device);
}

void aging_begin_generation(struct tm_device *device)
{
    pthread_mutex_lock(&device->demote_lock);
    begin(device);
    note_ages(device);
    pthread_mutex_unlock(&device->demote_lock);
}

void tm_begin_generation(struct tm_device *device)
{
    pthread_mutex_lock(&device->demote_lock);
    device->turns.ticks++;
    if (!device->ephemeral)
        begin(device);
    note_ages(device);
    pthread_mutex_unlock(&device->demote_lock);
}

/* Publish a sum by age, from one by generation. */
static void publish(const uint8_t *age_of, const _Atomic uint64_t *sums, _Atomic uint64_t *by_age)
{
    uint64_t found[TM_GENERATIONS] = {0};
    for (unsigned generation = 0; generation < TM_GENERATIONS; generation++)
        found[age_of[generation]] += ages_known(&sums[generation]);
    for (unsigned age = 0; age < TM_GENERATIONS; age++)
        atomic_store_explicit(&by_age[age], found[age], memory_order_relaxed);
}

void tm_publish_ages(struct tm_device *device)
{
    struct tm_statistics *statistics = device->statistics;
    uint8_t age_of[TM_GENERATIONS];
    unsigned now =
        atomic_load(&device->generation); /* once: tm_begin_generation may come between */
    for (unsigned generation = 0; generation < TM_GENERATIONS; generation++)
        age_of[generation] = (uint8_t)state_age_of(device, now, generation);
    publish(age_of, device->ages.stored, statistics->stored_by_age);
    publish(age_of, device->ages.raw, statistics->raw_by_age);
    publish(age_of, device->ages.in_file, statistics->in_file_by_age);
    atomic_fetch_add_explicit(&statistics->ages_published, 1, memory_order_release);
}
