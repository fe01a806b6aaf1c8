/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int load_bits(struct bitmap *bitmap)
{
    for (uint64_t byte = 0; byte * 8 < bitmap->n; byte++) {
        uint8_t bits;
        ssize_t got = pread(bitmap->fd, &bits, 1, (off_t)(BITMAP_BITS_OFFSET + byte));
        if (got != 1)
            return got < 0 ? errno : EIO;
        for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < bitmap->n; i++)
            atomic_init(&bitmap->regions[i], bits >> i % 8 & 1 ? BITMAP_SET : BITMAP_CLEAN);
    }
    return 0;
}

static void count_set(struct bitmap *bitmap)
{
    uint64_t set = 0;
    for (uint64_t i = 0; i < bitmap->n; i++)
        set += atomic_load(&bitmap->regions[i]) != BITMAP_CLEAN;
    atomic_store(&bitmap->counters->regions_set, set);
}

/* Write the byte that holds these eight regions' bits; a bit is clear only if its region is
 * BITMAP_CLEAN. */
static int write_byte(struct bitmap *bitmap, uint64_t byte)
{
    uint8_t bits = 0;
    for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < bitmap->n; i++)
        bits |= (uint8_t)((atomic_load(&bitmap->regions[i]) != BITMAP_CLEAN) << i % 8);
    ssize_t put = pwrite(bitmap->fd, &bits, 1, (off_t)(BITMAP_BITS_OFFSET + byte));
    return put == 1 ? 0 : put < 0 ? errno : EIO;
}

static int sync_bits(struct bitmap *bitmap) { return fdatasync(bitmap->fd) < 0 ? errno : 0; }

/* All are written again first: after a failed fdatasync the kernel marks its dirty pages clean. */
static int make_durable(struct bitmap *bitmap)
{
    int error = 0;
    for (uint64_t byte = 0; byte * 8 < bitmap->n && !error; byte++)
        error = write_byte(bitmap, byte);
    return error ? error : sync_bits(bitmap);
}

int bitmap_init(struct bitmap *bitmap, int fd, uint64_t region, const struct tm_layout *layout,
                struct tm_counters *counters)
{
    *bitmap = (struct bitmap){.fd = fd, .region_pages = region / TM_PAGE, .counters = counters};
    pthread_mutex_init(&bitmap->lock, NULL);
    if (fd < 0)
        return 0;
    if (!bitmap->region_pages)
        return EINVAL;
    bitmap->n = (layout->pages + bitmap->region_pages - 1) / bitmap->region_pages;
    bitmap->regions = calloc(bitmap->n, sizeof *bitmap->regions);
    if (!bitmap->regions)
        return ENOMEM;
    int error = load_bits(bitmap);
    count_set(bitmap);
    return error ? error : make_durable(bitmap);
}

void bitmap_destroy(struct bitmap *bitmap)
{
    free(bitmap->regions);
    pthread_mutex_destroy(&bitmap->lock);
}

static int set_bit(struct bitmap *bitmap, uint64_t region)
{
    atomic_store(&bitmap->regions[region], BITMAP_SETTING);
    int error = write_byte(bitmap, region / 8);
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
    if (atomic_load(&bitmap->regions[region]) == BITMAP_CLEAN)
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
    if (bitmap->fd < 0)
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
    if (bitmap->fd < 0)
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
