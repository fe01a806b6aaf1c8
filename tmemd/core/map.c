#define _GNU_SOURCE
#include "map.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static int load_bits(struct tm_map *map)
{
    for (uint64_t byte = 0; byte * 8 < map->n; byte++) {
        uint8_t bits;
        ssize_t got = pread(map->fd, &bits, 1, (off_t)(TM_MAP_BITS_OFFSET + byte));
        if (got != 1)
            return got < 0 ? errno : EIO;
        for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < map->n; i++)
            atomic_init(&map->granules[i], bits >> i % 8 & 1 ? TM_SET : TM_CLEAN);
    }
    return 0;
}

static void count_set(struct tm_map *map)
{
    uint64_t set = 0;
    for (uint64_t i = 0; i < map->n; i++)
        set += atomic_load(&map->granules[i]) != TM_CLEAN;
    atomic_store(&map->counters->granules_set, set);
}

int tm_map_init(struct tm_map *map, int fd, uint64_t granule, const struct tm_layout *layout,
                struct tm_counters *counters)
{
    *map = (struct tm_map){.fd = fd, .granule_pages = granule / TM_PAGE, .counters = counters};
    pthread_mutex_init(&map->lock, NULL);
    if (fd < 0)
        return 0;
    if (!map->granule_pages)
        return EINVAL;
    map->n = (layout->pages + map->granule_pages - 1) / map->granule_pages;
    map->granules = calloc(map->n, sizeof *map->granules);
    if (!map->granules)
        return ENOMEM;
    int error = load_bits(map);
    count_set(map);
    return error;
}

void tm_map_destroy(struct tm_map *map)
{
    free(map->granules);
    pthread_mutex_destroy(&map->lock);
}

/* Write the byte of the map that holds the granule's bit; a granule that is being cleaned is still set there. */
static int write_byte(struct tm_map *map, uint64_t byte)
{
    uint8_t bits = 0;
    for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < map->n; i++)
        bits |= (uint8_t)((atomic_load(&map->granules[i]) != TM_CLEAN) << i % 8);
    ssize_t put = pwrite(map->fd, &bits, 1, (off_t)(TM_MAP_BITS_OFFSET + byte));
    return put == 1 ? 0 : put < 0 ? errno : EIO;
}

static int set_bit(struct tm_map *map, uint64_t granule)
{
    atomic_store(&map->granules[granule], TM_CLEANING); /* only the byte below looks at it: not yet safe to rely on */
    int error = write_byte(map, granule / 8);
    if (!error && fdatasync(map->fd) < 0)
        error = errno;
    atomic_store_explicit(&map->granules[granule], error ? TM_CLEAN : TM_SET, memory_order_release);
    if (!error)
        atomic_fetch_add(&map->counters->granules_set, 1);
    return error;
}

int tm_map_mark_slow(struct tm_map *map, uint64_t granule)
{
    int error = 0;
    pthread_mutex_lock(&map->lock);
    uint8_t state = atomic_load(&map->granules[granule]);
    if (state == TM_CLEANING)
        atomic_store_explicit(&map->granules[granule], TM_SET, memory_order_release);
    else if (state == TM_CLEAN)
        error = set_bit(map, granule);
    pthread_mutex_unlock(&map->lock);
    return error;
}

void tm_map_begin_cleaning(struct tm_map *map)
{
    pthread_mutex_lock(&map->lock);
    for (uint64_t i = 0; i < map->n; i++)
        if (atomic_load(&map->granules[i]) == TM_SET)
            atomic_store(&map->granules[i], TM_CLEANING);
    pthread_mutex_unlock(&map->lock);
}

void tm_map_keep(struct tm_map *map, uint64_t granule)
{
    pthread_mutex_lock(&map->lock);
    if (atomic_load(&map->granules[granule]) == TM_CLEANING)
        atomic_store(&map->granules[granule], TM_SET);
    pthread_mutex_unlock(&map->lock);
}

int tm_map_finish_cleaning(struct tm_map *map)
{
    int error = 0;
    pthread_mutex_lock(&map->lock);
    for (uint64_t byte = 0; byte * 8 < map->n; byte++) {
        bool changed = false;
        for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < map->n; i++)
            if (atomic_load(&map->granules[i]) == TM_CLEANING) {
                atomic_store(&map->granules[i], TM_CLEAN);
                changed = true;
            }
        int failed = changed ? write_byte(map, byte) : 0;
        error = error ? error : failed;
    }
    if (!error && fdatasync(map->fd) < 0)
        error = errno;
    count_set(map);
    pthread_mutex_unlock(&map->lock);
    return error;
}
