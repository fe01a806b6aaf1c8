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

void aging_init(struct tm_device *device)
{
    uint64_t last = atomic_load(&device->statistics->generation);
    atomic_store(&device->generation, last >= 1 && last <= TM_ANCIENT ? (unsigned)last : 1);
    device->backoff.age = TM_GENERATIONS;
}

void tm_begin_generation(struct tm_device *device)
{
    pthread_mutex_lock(&device->demote_lock);
    unsigned next = atomic_load(&device->generation) % TM_ANCIENT + 1;
    forget_generation(device, next);
    atomic_store(&device->statistics->generation,
                 next); /* first: after a crash no page may seem younger than now */
    atomic_store(&device->generation, next);
    device->backoff.age = TM_GENERATIONS;
    pthread_mutex_unlock(&device->demote_lock);
}

void tm_publish_ages(struct tm_device *device)
{
    struct tm_statistics *statistics = device->statistics;
    unsigned now =
        atomic_load(&device->generation); /* once: tm_begin_generation may come between */
    for (unsigned age = 0; age < TM_GENERATIONS; age++) {
        unsigned then = ages_generation(now, age);
        const struct ages *ages = &device->ages;
        atomic_store_explicit(&statistics->stored_by_age[age], ages_known(&ages->stored[then]),
                              memory_order_relaxed);
        atomic_store_explicit(&statistics->raw_by_age[age], ages_known(&ages->raw[then]),
                              memory_order_relaxed);
        atomic_store_explicit(&statistics->in_file_by_age[age], ages_known(&ages->in_file[then]),
                              memory_order_relaxed);
    }
    atomic_fetch_add_explicit(&statistics->ages_published, 1, memory_order_release);
}
