/* Copies of pages that were read from the source and wait to be put: a miss does not pay for
 * compression. A bounded queue with one consumer; its mutex is a leaf, held for a copy of a page.
 */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* 4 MiB. One thread puts 150,000 pages a second; what comes faster for longer is not put. */
enum { STAGING_PAGES = 1024 };

struct staged {
    uint64_t page, word; /* what its word was when it was read */
    unsigned age;        /* as if it had been used so many generations ago */
    uint8_t content[TM_PAGE];
};

struct staging {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct staged *pages; /* NULL until the first comes */
    uint64_t in, out;     /* how many ever came, and went */
    bool started, stopping;
    pthread_t worker;
};

void staging_init(struct staging *staging);
/* End the worker, and forget what waits. */
void staging_destroy(struct staging *staging);
/* Take in a copy; false: there is no room. The first starts `work` in a thread of its own. */
bool staging_add(struct staging *staging, uint64_t page, uint64_t word, unsigned age,
                 const uint8_t *content, void *(*work)(void *), void *argument);
/* For the worker: wait for the oldest, which stays until it is removed. NULL: end. */
const struct staged *staging_first(struct staging *staging);
void staging_remove(struct staging *staging);
