/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "bounce.h"

#include <pthread.h>
#include <stddef.h>
#include <sys/mman.h>

#include "layout.h"

/* The most that are kept: 64 devices that spilled at once kept 30 MiB. */
enum { SPARE_MAX = 16 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct bounce *spare;
static unsigned n_spare;

/* By mmap, so that freeing returns the memory to the host; the structure lies behind the pages. */
enum { BYTES = TM_RUN_MAX * TM_PAGE };

static struct bounce *new_bounce(void)
{
    uint8_t *pages = mmap(NULL, BYTES + sizeof(struct bounce), PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        return NULL;
    struct bounce *bounce = (struct bounce *)(pages + BYTES);
    bounce->pages = pages;
    return bounce;
}

static void free_bounce(struct bounce *bounce) { munmap(bounce->pages, BYTES + sizeof *bounce); }

static struct bounce *take_spare(void)
{
    pthread_mutex_lock(&lock);
    struct bounce *bounce = spare;
    if (bounce) {
        spare = bounce->next;
        n_spare--;
    }
    pthread_mutex_unlock(&lock);
    return bounce;
}

struct bounce *bounce_get(void)
{
    struct bounce *bounce = take_spare();
    return bounce ? bounce : new_bounce();
}

void bounce_put(struct bounce *bounce)
{
    pthread_mutex_lock(&lock);
    if (n_spare < SPARE_MAX) {
        bounce->next = spare;
        spare = bounce;
        n_spare++;
        bounce = NULL;
    }
    pthread_mutex_unlock(&lock);
    if (bounce)
        free_bounce(bounce);
}

void bounce_release_spare(void)
{
    struct bounce *bounce;
    while ((bounce = take_spare()))
        free_bounce(bounce);
}
