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

/* Write the byte of the map that holds these eight granules' bits; only of a clean one it is clear. */
static int write_byte(struct tm_map *map, uint64_t byte)
{
    uint8_t bits = 0;
    for (uint64_t i = byte * 8; i < byte * 8 + 8 && i < map->n; i++)
        bits |= (uint8_t)((atomic_load(&map->granules[i]) != TM_CLEAN) << i % 8);
    ssize_t put = pwrite(map->fd, &bits, 1, (off_t)(TM_MAP_BITS_OFFSET + byte));
    return put == 1 ? 0 : put < 0 ? errno : EIO;
}

static int sync_bits(struct tm_map *map) { return fdatasync(map->fd) < 0 ? errno : 0; }

/* Written again first: of a sync that failed before, the kernel keeps the bits but not that they are missing on the disk. */
static int make_durable(struct tm_map *map)
{
    int error = 0;
    for (uint64_t byte = 0; byte * 8 < map->n && !error; byte++)
        error = write_byte(map, byte);
    return error ? error : sync_bits(map);
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
    return error ? error : make_durable(map);
}

void tm_map_destroy(struct tm_map *map)
{
    free(map->granules);
    pthread_mutex_destroy(&map->lock);
}

static int set_bit(struct tm_map *map, uint64_t granule)
{
    atomic_store(&map->granules[granule], TM_SETTING);
    int error = write_byte(map, granule / 8);
    if (!error)
        error = sync_bits(map);
    atomic_store(&map->granules[granule], error ? TM_CLEAN : TM_SET);
    if (!error)
        atomic_fetch_add(&map->counters->granules_set, 1);
    return error;
}

static int mark(struct tm_map *map, uint64_t granule)
{
    int error = 0;
    pthread_mutex_lock(&map->lock);
    if (atomic_load(&map->granules[granule]) == TM_CLEAN)
        error = set_bit(map, granule);
    pthread_mutex_unlock(&map->lock);
    return error;
}

static uint64_t end_granule(const struct tm_map *map, uint64_t first, uint32_t n)
{
    return (first + n - 1) / map->granule_pages + 1;
}

int tm_map_mark(struct tm_map *map, uint64_t first, uint32_t n)
{
    int error = 0;
    if (map->fd < 0)
        return 0;
    for (uint64_t i = first / map->granule_pages; i < end_granule(map, first, n) && !error; i++) {
        uint8_t state = atomic_load_explicit(&map->granules[i], memory_order_acquire);
        error = state == TM_CLEAN || state == TM_SETTING ? mark(map, i) : 0;
    }
    return error;
}

bool tm_map_is_marked(struct tm_map *map, uint64_t first, uint32_t n)
{
    if (map->fd < 0)
        return true;
    for (uint64_t i = first / map->granule_pages; i < end_granule(map, first, n); i++) {
        uint8_t state = TM_CLEANING;
        if (atomic_load_explicit(&map->granules[i], memory_order_acquire) != TM_SET &&
            !atomic_compare_exchange_strong(&map->granules[i], &state, TM_SET) && state != TM_SET)
            return false;
    }
    return true;
}

/* Turn a granule of one state into another. */
static void turn(struct tm_map *map, uint64_t granule, uint8_t from, uint8_t to)
{
    atomic_compare_exchange_strong(&map->granules[granule], &from, to);
}

void tm_map_begin_cleaning(struct tm_map *map)
{
    for (uint64_t i = 0; i < map->n; i++)
        turn(map, i, TM_SET, TM_CLEANING);
}

void tm_map_keep(struct tm_map *map, uint64_t granule) { turn(map, granule, TM_CLEANING, TM_SET); }

int tm_map_finish_cleaning(struct tm_map *map)
{
    int error = 0;
    pthread_mutex_lock(&map->lock);
    for (uint64_t i = 0; i < map->n; i++)
        turn(map, i, TM_CLEANING, TM_CLEAN);
    if (map->n)
        error = make_durable(map);
    count_set(map);
    pthread_mutex_unlock(&map->lock);
    return error;
}
