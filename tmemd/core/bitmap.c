/* SPDX-License-Identifier: BSD-3-Clause */
#include "bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_BITS = TM_PAGE * 8 };

static uint64_t block_offset(const struct bitmap *bitmap, uint64_t block)
{
    return bitmap->offset + BITMAP_BITS_OFFSET + block * TM_PAGE;
}

static uint64_t block_end(const struct bitmap *bitmap, uint64_t block)
{
    return (block + 1) * BLOCK_BITS < bitmap->n ? (block + 1) * BLOCK_BITS : bitmap->n;
}

/* Bytes of a block that hold bits. */
static size_t block_bytes(const struct bitmap *bitmap, uint64_t block)
{
    size_t bytes = (block_end(bitmap, block) - block * BLOCK_BITS + 7) / 8;
    return bitmap->whole_blocks ? TM_PAGE : bytes;
}

static int load_block(struct bitmap *bitmap, uint64_t block)
{
    size_t bytes = block_bytes(bitmap, block);
    int error =
        bitmap->store->ops->read(bitmap->store, block_offset(bitmap, block), bytes, bitmap->block);
    for (uint64_t i = block * BLOCK_BITS; i < block_end(bitmap, block) && !error; i++)
        atomic_init(&bitmap->regions[i],
                    bitmap->block[i % BLOCK_BITS / 8] >> i % 8 & 1 ? BITMAP_SET : BITMAP_CLEAN);
    return error;
}

static void count_set(struct bitmap *bitmap)
{
    uint64_t set = 0;
    for (uint64_t i = 0; i < bitmap->n; i++)
        set += atomic_load(&bitmap->regions[i]) != BITMAP_CLEAN;
    atomic_store(&bitmap->counters->regions_set, set);
}

/* Write the block of this region's bit; a bit is clear only if its region is BITMAP_CLEAN. */
static int write_block(struct bitmap *bitmap, uint64_t block)
{
    size_t bytes = block_bytes(bitmap, block);
    if (fence_is_reached(bitmap->fence))
        return EIO;
    memset(bitmap->block, 0, bytes);
    for (uint64_t i = block * BLOCK_BITS; i < block_end(bitmap, block); i++)
        bitmap->block[i % BLOCK_BITS / 8] |=
            (uint8_t)((atomic_load(&bitmap->regions[i]) != BITMAP_CLEAN) << i % 8);
    int error = bitmap->store->ops->write(bitmap->store, block_offset(bitmap, block), bytes,
                                          bitmap->block, true);
    if (error)
        store_note_failure(bitmap->store, &bitmap->counters->sync_failed);
    return error;
}

static int sync_bits(struct bitmap *bitmap)
{
    return bitmap->store->forgets ? 0 : bitmap->store->ops->sync(bitmap->store);
}

/* All are written again first: after a failed fdatasync the kernel marks its dirty pages clean. */
static int make_durable(struct bitmap *bitmap)
{
    int error = 0;
    for (uint64_t block = 0; block * BLOCK_BITS < bitmap->n && !error; block++)
        error = write_block(bitmap, block);
    return error ? error : sync_bits(bitmap);
}

static int load(struct bitmap *bitmap)
{
    int error = 0;
    for (uint64_t block = 0; block * BLOCK_BITS < bitmap->n && !error; block++)
        error = load_block(bitmap, block);
    count_set(bitmap);
    return error ? error : make_durable(bitmap);
}

int bitmap_init(struct bitmap *bitmap, const struct tm_config *config, const struct fence *fence,
                const struct tm_layout *layout, struct tm_counters *counters)
{
    *bitmap = (struct bitmap){
        .fence = fence, .region_pages = config->region / TM_PAGE, .counters = counters};
    pthread_mutex_init(&bitmap->lock, NULL);
    if (config->bitmap_fd >= 0) {
        local_init(&bitmap->local, config->bitmap_fd, false, false);
        bitmap->store = &bitmap->local.store;
    } else {
        bitmap->store = config->bitmap_offset ? config->remote : NULL;
    }
    bitmap->whole_blocks = config->bitmap_offset != 0;
    bitmap->offset = config->bitmap_offset;
    if (!bitmap->store)
        return 0;
    if (!bitmap->region_pages)
        return EINVAL;
    bitmap->n = (layout->pages + bitmap->region_pages - 1) / bitmap->region_pages;
    bitmap->regions = calloc(bitmap->n, sizeof *bitmap->regions);
    bitmap->block = aligned_alloc(TM_PAGE, TM_PAGE);
    return bitmap->regions && bitmap->block ? load(bitmap) : ENOMEM;
}

void bitmap_destroy(struct bitmap *bitmap)
{
    free(bitmap->regions);
    free(bitmap->block);
    pthread_mutex_destroy(&bitmap->lock);
}

static int set_bit(struct bitmap *bitmap, uint64_t region)
{
    atomic_store(&bitmap->regions[region], BITMAP_SETTING);
    int error = write_block(bitmap, region / BLOCK_BITS);
    if (!error)
        error = sync_bits(bitmap);
    atomic_store(&bitmap->regions[region], error ? BITMAP_CLEAN : BITMAP_SET);
    if (!error)
        atomic_fetch_add(&bitmap->counters->regions_set, 1);
    return error;
}

static int mark(struct bitmap *bitmap, uint64_t region)
{
    int error = 0;
    pthread_mutex_lock(&bitmap->lock);
    if (atomic_load(&bitmap->regions[region]) == BITMAP_CLEAN && !bitmap->rests)
        error = set_bit(bitmap, region);
    pthread_mutex_unlock(&bitmap->lock);
    return error;
}

static uint64_t end_region(const struct bitmap *bitmap, uint64_t first, uint32_t n)
{
    return (first + n - 1) / bitmap->region_pages + 1;
}

int bitmap_set(struct bitmap *bitmap, uint64_t first, uint32_t n)
{
    int error = 0;
    if (!bitmap->store)
        return 0;
    for (uint64_t i = first / bitmap->region_pages; i < end_region(bitmap, first, n) && !error;
         i++) {
        uint8_t state = atomic_load_explicit(&bitmap->regions[i], memory_order_acquire);
        error = state == BITMAP_CLEAN || state == BITMAP_SETTING ? mark(bitmap, i) : 0;
    }
    return error;
}

bool bitmap_is_set(struct bitmap *bitmap, uint64_t first, uint32_t n)
{
    if (!bitmap->store)
        return true;
    for (uint64_t i = first / bitmap->region_pages; i < end_region(bitmap, first, n); i++) {
        uint8_t state = BITMAP_CLEANING;
        if (atomic_load_explicit(&bitmap->regions[i], memory_order_acquire) != BITMAP_SET &&
            !atomic_compare_exchange_strong(&bitmap->regions[i], &state, BITMAP_SET) &&
            state != BITMAP_SET)
            return false;
    }
    return true;
}

/* Turn a region of one state into another. */
static void turn(struct bitmap *bitmap, uint64_t region, uint8_t from, uint8_t to)
{
    atomic_compare_exchange_strong(&bitmap->regions[region], &from, to);
}

void bitmap_begin_cleaning(struct bitmap *bitmap)
{
    for (uint64_t i = 0; i < bitmap->n; i++)
        turn(bitmap, i, BITMAP_SET, BITMAP_CLEANING);
}

void bitmap_keep(struct bitmap *bitmap, uint64_t region)
{
    turn(bitmap, region, BITMAP_CLEANING, BITMAP_SET);
}

int bitmap_finish_cleaning(struct bitmap *bitmap)
{
    int error = 0;
    pthread_mutex_lock(&bitmap->lock);
    for (uint64_t i = 0; i < bitmap->n; i++)
        turn(bitmap, i, BITMAP_CLEANING, BITMAP_CLEAN);
    if (bitmap->n)
        error = make_durable(bitmap);
    count_set(bitmap);
    pthread_mutex_unlock(&bitmap->lock);
    return error;
}

int bitmap_rest(struct bitmap *bitmap)
{
    pthread_mutex_lock(&bitmap->lock);
    for (uint64_t i = 0; i < bitmap->n; i++)
        atomic_store(&bitmap->regions[i], BITMAP_CLEAN);
    int error = bitmap->n ? make_durable(bitmap) : 0;
    bitmap->rests = !error; /* the disk may have any of them then: who needs one sets it again */
    count_set(bitmap);
    pthread_mutex_unlock(&bitmap->lock);
    return error;
}

void bitmap_wake(struct bitmap *bitmap)
{
    pthread_mutex_lock(&bitmap->lock);
    bitmap->rests = false;
    pthread_mutex_unlock(&bitmap->lock);
}
