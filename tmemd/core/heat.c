/* Which pages were used when: the generation in an index word. */
#include "device.h"

static bool is_of(uint64_t word, unsigned generation)
{
    return (tm_kind(word) == TM_TMEM || tm_kind(word) == TM_FILE) && tm_generation(word) == generation;
}

/* The page becomes ancient, if it still is of this generation. */
static void forget_page(struct tm_device *device, uint64_t page, unsigned generation)
{
    tm_look(&device->locks, page);
    uint64_t word = tm_word(device, page);
    if (is_of(word, generation))
        tm_touch(device, page, tm_with_generation(word, 0));
    tm_unlook(&device->locks, page);
}

/* Before a generation's number is used again: the oldest pages may not become the youngest. */
static void forget_generation(struct tm_device *device, unsigned generation)
{
    uint64_t words[TM_BLOCK_PAGES];
    for (uint64_t block = 0; block < device->layout.blocks; block++) {
        if (!tm_copy_words(device, block, words))
            continue;
        for (uint32_t i = 0; i < tm_block_pages(device, block); i++)
            if (is_of(words[i], generation))
                forget_page(device, block * TM_BLOCK_PAGES + i, generation);
    }
}

void tm_age(struct tm_device *device)
{
    pthread_mutex_lock(&device->clean_lock);
    unsigned next = atomic_load(&device->generation) % TM_ANCIENT + 1;
    forget_generation(device, next);
    atomic_store(&device->generation, next);
    pthread_mutex_unlock(&device->clean_lock);
}
