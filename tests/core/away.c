/* SPDX-License-Identifier: BSD-3-Clause */
/* Threads read and write pages of their own while the NBD server that has them is killed and
 * started again and again: no request fails, and each page is its newest. In the directory that is
 * given; exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <pthread.h>

#include "link.h"
#include "server.h"
#include "store.h"

enum { THREADS = 4, EACH = 64, RUN = 8, PAGES = THREADS * EACH, KILLS = 12, REQUESTS = 150 };

static _Atomic bool over;
static _Atomic uint64_t done;

/* As the thread that watches it in a device's process. */
static void *look_after(void *unused)
{
    (void)unused;
    while (!atomic_load(&over)) {
        remote_look_after(remote);
        if (!remote_is_away(remote))
            overflow_write_back(overflow);
        usleep(500);
    }
    return NULL;
}

struct owner {
    pthread_t thread;
    uint64_t first;
    uint8_t versions[EACH];
    uint8_t content[RUN * TM_PAGE];
};

static void write_run(struct owner *owner, struct store *store, uint64_t at, unsigned *seed)
{
    uint8_t version = (uint8_t)rand_r(seed);
    memset(owner->content, version, sizeof owner->content);
    memset(owner->versions + at, version, RUN);
    CHECK(store->ops->write(store, (owner->first + at) * TM_PAGE, sizeof owner->content,
                            owner->content, version & 1) == 0);
}

static void check_run(struct owner *owner, struct store *store, uint64_t at)
{
    CHECK(store->ops->read(store, (owner->first + at) * TM_PAGE, sizeof owner->content,
                           owner->content) == 0);
    for (uint64_t byte = 0; byte < sizeof owner->content; byte++)
        CHECK(owner->content[byte] == owner->versions[at + byte / TM_PAGE]);
}

static void *use(void *argument)
{
    struct owner *owner = argument;
    struct store *store = overflow_store(overflow);
    unsigned seed = (unsigned)owner->first;
    while (!atomic_load(&over)) {
        uint64_t at = (uint64_t)rand_r(&seed) % (EACH - RUN + 1);
        if (remote_is_away(remote) || rand_r(&seed) % 2)
            write_run(owner, store, at, &seed);
        check_run(owner, store, at);
        atomic_fetch_add(&done, 1);
    }
    for (uint64_t at = 0; at < EACH; at += RUN)
        check_run(owner, store, at);
    return NULL;
}

static void wait_for_requests(uint64_t more)
{
    uint64_t goal = atomic_load(&done) + more;
    while (atomic_load(&done) < goal)
        usleep(1000);
}

int main(int argc, char **argv)
{
    static struct owner owners[THREADS];
    pthread_t watcher;
    CHECK(argc == 2);
    open_all(argv[1], PAGES);
    CHECK(pthread_create(&watcher, NULL, look_after, NULL) == 0);
    for (int i = 0; i < THREADS; i++) {
        owners[i].first = (uint64_t)i * EACH;
        CHECK(pthread_create(&owners[i].thread, NULL, use, &owners[i]) == 0);
    }
    for (int kills = 0; kills < KILLS; kills++) {
        pid_t server = start_server();
        wait_for_requests(REQUESTS);
        end_server(server);
        while (!remote_is_away(remote))
            usleep(100);
    }
    pid_t server = start_server();
    atomic_store(&over, true);
    for (int i = 0; i < THREADS; i++)
        pthread_join(owners[i].thread, NULL);
    pthread_join(watcher, NULL);
    struct remote_status status;
    remote_get_status(remote, &status);
    CHECK(status.losses > 0 && status.time_outs == 0);
    overflow_free(overflow);
    remote_free(remote);
    end_server(server);
    puts("ok");
    return 0;
}
