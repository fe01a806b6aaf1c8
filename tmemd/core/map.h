/* The map: one durable bit for each granule of the device. A set bit says that after the host died the file is not to be
 * trusted there; it is set before a change is acknowledged and cleared only after the file is durable. */
#ifndef TM_MAP_H
#define TM_MAP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

enum { TM_MAP_BITS_OFFSET = TM_PAGE };

enum tm_granule { TM_CLEAN = 0, TM_SET = 1, TM_CLEANING = 2 };

struct tm_map {
    int fd; /* -1: none */
    uint64_t granule_pages, n;
    _Atomic uint8_t *granules; /* enum tm_granule */
    struct tm_counters *counters;
    pthread_mutex_t lock; /* held over each change of a bit, its fdatasync included */
};

int tm_map_init(struct tm_map *map, int fd, uint64_t granule, const struct tm_layout *layout,
                struct tm_counters *counters);
void tm_map_destroy(struct tm_map *map);

/* Set the bit of the page's granule, durably, if it is not: call under the page's change lock, before what makes the file
 * stale. A cleaning under way there is called off. */
int tm_map_mark_slow(struct tm_map *map, uint64_t granule);
static inline int tm_map_mark(struct tm_map *map, uint64_t page)
{
    if (map->fd < 0)
        return 0;
    uint64_t granule = page / map->granule_pages;
    return atomic_load_explicit(&map->granules[granule], memory_order_acquire) == TM_SET
               ? 0
               : tm_map_mark_slow(map, granule);
}

/* Cleaning, for one caller at a time: begin turns every set granule into cleaning, keep takes one back, finish clears the
 * bits of those that nobody marked since. */
void tm_map_begin_cleaning(struct tm_map *map);
void tm_map_keep(struct tm_map *map, uint64_t granule);
int tm_map_finish_cleaning(struct tm_map *map);
static inline bool tm_map_is_cleaning(struct tm_map *map, uint64_t granule)
{
    return atomic_load(&map->granules[granule]) == TM_CLEANING;
}

#endif
