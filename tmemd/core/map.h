/* The map: one durable bit for each granule of the device. A set bit says that after the host died the file is not to be
 * trusted there; it is set before a change is acknowledged and cleared only after the file is durable. */
#ifndef TM_MAP_H
#define TM_MAP_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

enum { TM_MAP_BITS_OFFSET = TM_PAGE };

/* TM_SETTING: its bit is on the way to the disk. TM_CLEANING: its bit is set, and will be cleared unless somebody changes
 * something there that the file does not hold. */
enum tm_granule { TM_CLEAN = 0, TM_SET = 1, TM_CLEANING = 2, TM_SETTING = 3 };

struct tm_map {
    int fd; /* -1: none */
    uint64_t granule_pages, n;
    _Atomic uint8_t *granules; /* enum tm_granule */
    struct tm_counters *counters;
    pthread_mutex_t lock; /* held over each write of bits, its fdatasync included */
};

/* Read the bits, and make them durable: what a process that was killed has left may not have reached the disk. */
int tm_map_init(struct tm_map *map, int fd, uint64_t granule, const struct tm_layout *layout,
                struct tm_counters *counters);
void tm_map_destroy(struct tm_map *map);

/* Set the bits of n pages, durably, where they are not: no lock is held. */
int tm_map_mark(struct tm_map *map, uint64_t first, uint32_t n);
/* Whether they are set and will stay so as long as the pages' change locks are held, which they are: a cleaning that is under
 * way there is called off. */
bool tm_map_is_marked(struct tm_map *map, uint64_t first, uint32_t n);

/* Cleaning, for one caller at a time: begin turns every set granule into cleaning, keep takes one back, finish clears the
 * bits of those that nobody has marked since. Between begin and the first look at a page, whoever held a change lock must have
 * let go of it. */
void tm_map_begin_cleaning(struct tm_map *map);
void tm_map_keep(struct tm_map *map, uint64_t granule);
int tm_map_finish_cleaning(struct tm_map *map);
static inline bool tm_map_is_set(struct tm_map *map, uint64_t granule)
{
    return atomic_load(&map->granules[granule]) != TM_CLEAN;
}

#endif
