#include "locks.h"

#include <stddef.h>

void tm_locks_init(struct tm_locks *locks)
{
    for (size_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_init(&locks->stripes[i].change, NULL);
        pthread_mutex_init(&locks->stripes[i].look, NULL);
    }
    pthread_mutex_init(&locks->io_lock, NULL);
    pthread_cond_init(&locks->io_released, NULL);
    locks->io = NULL;
}

void tm_locks_destroy(struct tm_locks *locks)
{
    for (size_t i = 0; i < TM_STRIPES; i++) {
        pthread_mutex_destroy(&locks->stripes[i].change);
        pthread_mutex_destroy(&locks->stripes[i].look);
    }
    pthread_mutex_destroy(&locks->io_lock);
    pthread_cond_destroy(&locks->io_released);
}

static bool overlap(const struct tm_io *one, const struct tm_io *other)
{
    return one->first < other->first + other->n && other->first < one->first + one->n;
}

static bool must_wait(const struct tm_locks *locks, const struct tm_io *io)
{
    const struct tm_io *earlier = locks->io;
    while (earlier != io && !overlap(earlier, io))
        earlier = earlier->next;
    return earlier != io;
}

/* The link that leads to `io`, or (NULL) the last one. */
static struct tm_io **link_to(struct tm_locks *locks, const struct tm_io *io)
{
    struct tm_io **link = &locks->io;
    while (*link != io)
        link = &(*link)->next;
    return link;
}

void tm_io_lock(struct tm_locks *locks, struct tm_io *io)
{
    pthread_mutex_lock(&locks->io_lock);
    io->next = NULL;
    *link_to(locks, NULL) = io;
    while (must_wait(locks, io))
        pthread_cond_wait(&locks->io_released, &locks->io_lock);
    pthread_mutex_unlock(&locks->io_lock);
}

void tm_io_unlock(struct tm_locks *locks, struct tm_io *io)
{
    pthread_mutex_lock(&locks->io_lock);
    *link_to(locks, io) = io->next;
    pthread_cond_broadcast(&locks->io_released);
    pthread_mutex_unlock(&locks->io_lock);
}
