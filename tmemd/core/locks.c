/* SPDX-License-Identifier: BSD-3-Clause */
#include "locks.h"

#include <stddef.h>

void locks_init(struct locks *locks)
{
    for (size_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_init(&locks->stripes[i].page, NULL);
        pthread_mutex_init(&locks->stripes[i].entry, NULL);
    }
    pthread_mutex_init(&locks->io_lock, NULL);
    pthread_cond_init(&locks->io_released, NULL);
    locks->io = NULL;
}

void locks_destroy(struct locks *locks)
{
    for (size_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_destroy(&locks->stripes[i].page);
        pthread_mutex_destroy(&locks->stripes[i].entry);
    }
    pthread_mutex_destroy(&locks->io_lock);
    pthread_cond_destroy(&locks->io_released);
}

void locks_wait_for_pages(struct locks *locks)
{
    for (size_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_lock(&locks->stripes[i].page);
        pthread_mutex_unlock(&locks->stripes[i].page);
    }
}

static bool overlap(const struct io_range *one, const struct io_range *other)
{
    return one->first < other->first + other->n && other->first < one->first + one->n;
}

static bool must_wait(const struct locks *locks, const struct io_range *io)
{
    const struct io_range *earlier = locks->io;
    while (earlier != io && !overlap(earlier, io))
        earlier = earlier->next;
    return earlier != io;
}

/* The link that leads to `io`, or (NULL) the last one. */
static struct io_range **link_to(struct locks *locks, const struct io_range *io)
{
    struct io_range **link = &locks->io;
    while (*link != io)
        link = &(*link)->next;
    return link;
}

void lock_io(struct locks *locks, struct io_range *io)
{
    pthread_mutex_lock(&locks->io_lock);
    io->next = NULL;
    *link_to(locks, NULL) = io;
    while (must_wait(locks, io))
        pthread_cond_wait(&locks->io_released, &locks->io_lock);
    pthread_mutex_unlock(&locks->io_lock);
}

void unlock_io(struct locks *locks, struct io_range *io)
{
    pthread_mutex_lock(&locks->io_lock);
    *link_to(locks, io) = io->next;
    pthread_cond_broadcast(&locks->io_released);
    pthread_mutex_unlock(&locks->io_lock);
}
