#include "staging.h"

#include <stdlib.h>
#include <string.h>

void staging_init(struct staging *staging)
{
    *staging = (struct staging){0};
    pthread_mutex_init(&staging->lock, NULL);
    pthread_cond_init(&staging->changed, NULL);
}

void staging_destroy(struct staging *staging)
{
    pthread_mutex_lock(&staging->lock);
    staging->stopping = true;
    pthread_cond_signal(&staging->changed);
    pthread_mutex_unlock(&staging->lock);
    if (staging->started)
        pthread_join(staging->worker, NULL);
    free(staging->pages);
    pthread_mutex_destroy(&staging->lock);
    pthread_cond_destroy(&staging->changed);
}

/* Whether there is somebody to take what comes in: a thread of this process, not of one that has
 * forked since. */
static bool start(struct staging *staging, void *(*work)(void *), void *argument)
{
    if (!staging->pages)
        staging->pages = malloc(STAGING_PAGES * sizeof *staging->pages);
    if (!staging->started && staging->pages)
        staging->started = pthread_create(&staging->worker, NULL, work, argument) == 0;
    return staging->started;
}

bool staging_add(struct staging *staging, uint64_t page, uint64_t word, unsigned age,
                 const uint8_t *content, void *(*work)(void *), void *argument)
{
    pthread_mutex_lock(&staging->lock);
    bool added = staging->in - staging->out < STAGING_PAGES && start(staging, work, argument);
    if (added) {
        struct staged *staged = &staging->pages[staging->in++ % STAGING_PAGES];
        staged->page = page;
        staged->word = word;
        staged->age = age;
        memcpy(staged->content, content, TM_PAGE);
        pthread_cond_signal(&staging->changed);
    }
    pthread_mutex_unlock(&staging->lock);
    return added;
}

const struct staged *staging_first(struct staging *staging)
{
    pthread_mutex_lock(&staging->lock);
    while (staging->in == staging->out && !staging->stopping)
        pthread_cond_wait(&staging->changed, &staging->lock);
    const struct staged *first =
        staging->stopping ? NULL : &staging->pages[staging->out % STAGING_PAGES];
    pthread_mutex_unlock(&staging->lock);
    return first;
}

void staging_remove(struct staging *staging)
{
    pthread_mutex_lock(&staging->lock);
    staging->out++;
    pthread_mutex_unlock(&staging->lock);
}
