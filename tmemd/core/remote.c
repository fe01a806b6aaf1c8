/* SPDX-License-Identifier: BSD-3-Clause */
/* A connection that is lost fails all that is under way on it, and each of these requests is sent
 * again on another. They are all idempotent, and their owners hold what orders them until they have
 * an answer. An answer that is late counts as a lost connection: half of the time-out, so that
 * there is a second try.
 *
 * What the server has acknowledged, but not synced, it may have forgotten when it comes back, for
 * its host may have died: nobody tells. So a lost connection makes all that was written since the
 * last sync `unsure`, and what must not be is written through (FUA). */
#define _GNU_SOURCE
#include "remote.h"

#include <errno.h>
#include <libnbd.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "link.h"
#include "store.h"
#include "tmem.h"

enum {
    CONNECT_MS = 5000, /* for one attempt */
    BACKOFF_FIRST_MS = 100,
    BACKOFF_MOST_MS = 5000,
    LASTING_MS = 1000, /* a connection that is lost sooner is no better than none */
    BRIEF_MS = 1000,
    HURRY_MS = 2000,
    ZERO_MOST = 1 << 30, /* bytes of one request */
};

struct remote {
    struct store store;
    _Atomic bool unsure; /* the store's */
    bool brief;          /* changes that find it away do not wait for long */
    char *uri;
    unsigned n_made, n_links; /* links, and of these wanted: 1 if the server does not see to all its
                                 connections together */
    uint32_t timeout_ms;
    _Atomic uint64_t last; /* nothing waits longer */
    pthread_mutex_t lock;  /* guards what follows up to `links`; not held over a connect */
    pthread_cond_t changed;
    struct link_limits limits; /* known before any request, from the first connection or by
                                  remote_know; fixed from then on, as is n_links */
    bool connecting;           /* somebody is */
    uint64_t next_try, backoff_ms, away_since;
    struct link_mark mark;
    char why[REMOTE_WHY];
    uint64_t connected[REMOTE_LINKS]; /* when each was, last */
    struct link links[REMOTE_LINKS];
    _Atomic uint64_t plain;   /* writes begun that are not through */
    _Atomic bool inherited;   /* the store's */
    _Atomic uint64_t synced;  /* how many of these a sync has covered */
    _Atomic bool sync_failed; /* one that nobody had asked for by itself */
    _Atomic uint64_t connects, time_outs, repeats;
};

static struct remote *remote_of(struct store *store) { return (struct remote *)store; }

static bool has_unsynced(struct remote *remote)
{
    return atomic_load(&remote->inherited) ||
           atomic_load(&remote->plain) != atomic_load(&remote->synced);
}

/* The connection with least to do; NULL: there is none. */
static struct link *pick(struct remote *remote)
{
    struct link *best = NULL;
    for (unsigned i = 0; i < remote->n_links; i++) {
        struct link *link = &remote->links[i];
        if (atomic_load(&link->nbd) && !atomic_load(&link->doomed) &&
            (!best || atomic_load(&link->in_flight) < atomic_load(&best->in_flight)))
            best = link;
    }
    return best;
}

static struct link *find_missing(struct remote *remote)
{
    for (unsigned i = 0; i < remote->n_links; i++)
        if (!atomic_load(&remote->links[i].nbd))
            return &remote->links[i];
    return NULL;
}

static uint64_t earlier(uint64_t one, uint64_t other) { return one < other ? one : other; }

static uint64_t bound(const struct remote *remote, uint64_t deadline)
{
    return earlier(deadline, atomic_load_explicit(&remote->last, memory_order_relaxed));
}

/* When to try again: later each time, as long as connections fail, or do not last. */
static void note_try(struct remote *remote, struct link *link, int error)
{
    uint64_t now = link_now(), *connected = &remote->connected[link - remote->links];
    bool in_vain = error || (*connected && now < *connected + remote->backoff_ms + LASTING_MS);
    uint64_t longer =
        remote->backoff_ms ? earlier(2 * remote->backoff_ms, BACKOFF_MOST_MS) : BACKOFF_FIRST_MS;
    remote->backoff_ms = in_vain ? longer : 0;
    remote->next_try = now + remote->backoff_ms;
    if (!error)
        *connected = now;
}

static void learn(struct remote *remote, const struct link_limits *limits)
{
    remote->limits = *limits;
    remote->store.trims = limits->can_zero;
    remote->n_links = limits->can_multi_conn ? remote->n_links : 1;
}

/* Connect a link by `deadline`, or note why not. With the lock, which is let go of meanwhile;
 * `connecting` keeps others out. */
static int connect_link(struct remote *remote, struct link *link, uint64_t deadline)
{
    struct link_mark mark = remote->mark;
    struct link_limits limits = remote->limits;
    char why[REMOTE_WHY] = "";
    remote->connecting = true;
    pthread_mutex_unlock(&remote->lock);
    /* Before anybody can sync over it: a connection that lives is to a server that knows all. */
    if (has_unsynced(remote))
        atomic_store(&remote->unsure, true);
    int error = link_open(link, remote->uri, earlier(deadline, link_now() + CONNECT_MS), &mark,
                          &limits, why, sizeof why);
    pthread_mutex_lock(&remote->lock);
    remote->connecting = false;
    memcpy(remote->why, why, sizeof why);
    note_try(remote, link, error);
    if (!error) {
        if (!remote->limits.size)
            learn(remote, &limits);
        remote->away_since = 0;
        atomic_fetch_add(&remote->connects, 1);
    }
    pthread_cond_broadcast(&remote->changed);
    return error;
}

static void note_absence(struct remote *remote)
{
    if (!remote->away_since)
        remote->away_since = link_now();
}

/* A connection, made if there is none; NULL: not by the deadline. */
static struct link *get_link(struct remote *remote, uint64_t deadline)
{
    struct link *link = pick(remote);
    if (link)
        return link;
    pthread_mutex_lock(&remote->lock);
    while (!(link = pick(remote)) && link_now() < bound(remote, deadline)) {
        note_absence(remote);
        if (remote->connecting)
            link_cond_wait(&remote->changed, &remote->lock, bound(remote, deadline));
        else if (link_now() < remote->next_try)
            link_cond_wait(&remote->changed, &remote->lock,
                           bound(remote, earlier(deadline, remote->next_try)));
        else
            connect_link(remote, &remote->links[0], bound(remote, deadline));
    }
    pthread_mutex_unlock(&remote->lock);
    return link;
}

/* Wait until the server is done with all changes whose connections were given up: one of them could
 * come true after a newer one that is sent now. Returns whether it is. */
static bool await_late(struct remote *remote, uint64_t deadline)
{
    for (unsigned i = 0; i < remote->n_made; i++) {
        struct pollfd late = {.events = POLLIN};
        while ((late.fd = link_late(&remote->links[i])) >= 0) {
            uint64_t now = link_now(), end = bound(remote, deadline),
                     left = earlier(end - earlier(now, end), 100);
            if (!left)
                return false;
            poll(&late, 1, (int)left);
        }
    }
    return true;
}

/* Have it answered, on whatever connection. ETIMEDOUT: by none in time. */
static int run(struct remote *remote, struct link_request request)
{
    uint64_t deadline = link_now() + remote->timeout_ms;
    bool brief = remote->brief && request.op != LINK_READ && !request.patient;
    for (unsigned tries = 0;; tries++) {
        uint64_t until = brief ? earlier(deadline, link_now() + BRIEF_MS) : deadline;
        bool ready = !link_is_change(request.op) || await_late(remote, until);
        struct link *link = ready ? get_link(remote, until) : NULL;
        if (!link) {
            atomic_fetch_add(&remote->time_outs, !brief); /* something else takes those */
            return ETIMEDOUT;
        }
        if (tries)
            atomic_fetch_add(&remote->repeats, 1);
        int error = link_run(link, &request,
                             bound(remote, earlier(deadline, link_now() + remote->timeout_ms / 2)));
        if (error != ENOTCONN)
            return error;
    }
}

static int run_flush(struct remote *remote)
{
    return run(remote, (struct link_request){.op = LINK_FLUSH});
}

/* Have a run of bytes answered in requests of at most `most`. */
static int run_all(struct remote *remote, struct link_request whole, uint32_t most)
{
    struct link_request part = whole;
    int error = 0;
    for (size_t done = 0; done < whole.length && !error; done += part.length) {
        part.offset = whole.offset + done;
        part.length = earlier(whole.length - done, most);
        part.buffer = whole.buffer ? (uint8_t *)whole.buffer + done : NULL;
        error = run(remote, part);
    }
    return error;
}

int remote_read(struct remote *remote, uint64_t offset, size_t length, void *buffer)
{
    struct link_request whole = {
        .op = LINK_READ, .offset = offset, .length = length, .buffer = buffer};
    return run_all(remote, whole, remote->limits.most);
}

/* What is written through is synced by the server, which then syncs all the rest as well: that this
 * failed it tells nobody else. */
static int note_sync(struct remote *remote, int error)
{
    if (error && error != ETIMEDOUT && has_unsynced(remote))
        atomic_store(&remote->sync_failed, true);
    return error;
}

/* A change; through: it is durable when this returns, whatever connections were lost meanwhile. */
static int change(struct remote *remote, struct link_request whole, bool through)
{
    uint32_t most = whole.op == LINK_ZERO ? ZERO_MOST : remote->limits.most;
    if (through && remote->limits.can_fua) {
        whole.flags |= LIBNBD_CMD_FLAG_FUA;
        return note_sync(remote, run_all(remote, whole, most));
    }
    if (!through) {
        atomic_fetch_add(&remote->plain, 1);
        return run_all(remote, whole, most);
    }
    for (;;) {
        uint64_t connects = atomic_load(&remote->connects);
        int error = run_all(remote, whole, most);
        if (!error && remote->limits.can_flush)
            error = note_sync(remote, run_flush(remote));
        if (error || connects == atomic_load(&remote->connects))
            return error;
    }
}

static struct link_request write_of(uint64_t offset, size_t length, const void *buffer)
{
    return (struct link_request){
        .op = LINK_WRITE, .offset = offset, .length = length, .buffer = (void *)(uintptr_t)buffer};
}

int remote_write(struct remote *remote, uint64_t offset, size_t length, const void *buffer,
                 bool through)
{
    return change(remote, write_of(offset, length, buffer), through);
}

int remote_write_patiently(struct remote *remote, uint64_t offset, size_t length,
                           const void *buffer, bool through)
{
    struct link_request whole = write_of(offset, length, buffer);
    whole.patient = true;
    return change(remote, whole, through);
}

static int read_op(struct store *store, uint64_t offset, size_t length, void *buffer)
{
    return remote_read(remote_of(store), offset, length, buffer);
}

static int write_op(struct store *store, uint64_t offset, size_t length, const void *buffer,
                    bool through)
{
    struct link_request whole = write_of(offset, length, buffer);
    whole.fence = store->fence;
    return change(remote_of(store), whole, through);
}

static int zero_op(struct store *store, uint64_t offset, uint64_t length, bool punch, bool through)
{
    struct remote *remote = remote_of(store);
    struct link_request whole = {.op = LINK_ZERO,
                                 .flags = punch ? 0 : LIBNBD_CMD_FLAG_NO_HOLE,
                                 .offset = offset,
                                 .length = length,
                                 .fence = store->fence};
    return remote->limits.can_zero ? change(remote, whole, through) : ENOTSUP;
}

static int sync_op(struct store *store)
{
    struct remote *remote = remote_of(store);
    uint64_t plain = atomic_load(&remote->plain);
    if (atomic_load(&remote->sync_failed))
        return EIO;
    if (atomic_load(&remote->unsure))
        return EAGAIN;
    if (!has_unsynced(remote))
        return 0;
    int error = remote->limits.can_flush ? run_flush(remote) : 0;
    if (error == ETIMEDOUT || atomic_load(&remote->unsure))
        return EAGAIN;
    if (!error) {
        atomic_store(&remote->synced, plain);
        atomic_store(&remote->inherited, false);
    }
    return error;
}

static bool is_away_op(struct store *store) { return remote_is_away(remote_of(store)); }

static const struct store_ops ops = {read_op, write_op, zero_op, sync_op, is_away_op};

int remote_new(const struct remote_config *config, struct remote **made)
{
    struct remote *remote = calloc(1, sizeof *remote);
    if (!remote)
        return ENOMEM;
    remote->store = (struct store){.ops = &ops,
                                   .forgets = true,
                                   .unsure = &remote->unsure,
                                   .inherited = &remote->inherited,
                                   .sync_failed = &remote->sync_failed};
    remote->unsure = true;
    remote->timeout_ms = config->timeout_ms;
    remote->last = UINT64_MAX;
    pthread_mutex_init(&remote->lock, NULL);
    link_cond_init(&remote->changed);
    remote->uri = strdup(config->uri);
    int error = remote->uri ? 0 : ENOMEM;
    while (!error && remote->n_made < config->connections && remote->n_made < REMOTE_LINKS)
        error = link_init(&remote->links[remote->n_made++]);
    remote->n_links = remote->n_made;
    if (error)
        remote_free(remote);
    else
        *made = remote;
    return error;
}

void remote_free(struct remote *remote)
{
    for (unsigned i = 0; i < remote->n_made; i++)
        link_destroy(&remote->links[i]);
    free(remote->uri);
    pthread_cond_destroy(&remote->changed);
    pthread_mutex_destroy(&remote->lock);
    free(remote);
}

uint64_t remote_size(const struct remote *remote) { return remote->limits.size; }

void remote_be_brief(struct remote *remote) { remote->brief = true; }

bool remote_is_away(struct remote *remote) { return !pick(remote) || !await_late(remote, 0); }

struct store *remote_store(struct remote *remote) { return &remote->store; }

int remote_connect(struct remote *remote, char *why, size_t why_size)
{
    uint64_t deadline = link_now() + remote->timeout_ms;
    int error = 0;
    pthread_mutex_lock(&remote->lock);
    /* All of them before anything is written: a later one may be to a server that has forgotten. */
    for (struct link *missing; !error && (missing = find_missing(remote));)
        error = connect_link(remote, missing, deadline);
    if (pick(remote))
        error = 0;
    snprintf(why, why_size, "%s", remote->why);
    pthread_mutex_unlock(&remote->lock);
    return error;
}

/* In one word: the most and the least bytes of a request, and what it can. */
static uint64_t pack(const struct link_limits *limits)
{
    return (uint64_t)limits->most << 32 | (uint64_t)limits->least << 8 | limits->read_only |
           limits->can_flush << 1 | limits->can_fua << 2 | limits->can_zero << 3 |
           limits->can_multi_conn << 4;
}

static struct link_limits unpack(uint64_t size, uint64_t abilities)
{
    return (struct link_limits){
        .size = size,
        .least = (uint32_t)abilities >> 8,
        .most = (uint32_t)(abilities >> 32),
        .read_only = abilities & 1,
        .can_flush = abilities >> 1 & 1,
        .can_fua = abilities >> 2 & 1,
        .can_zero = abilities >> 3 & 1,
        .can_multi_conn = abilities >> 4 & 1,
    };
}

int remote_know(struct remote *remote, uint64_t size, uint64_t abilities)
{
    struct link_limits limits = unpack(size, abilities);
    if (!size || !limits.least || limits.least > TM_PAGE || limits.most < TM_PAGE)
        return EINVAL;
    pthread_mutex_lock(&remote->lock);
    learn(remote, &limits);
    note_absence(remote);
    pthread_mutex_unlock(&remote->lock);
    return 0;
}

int remote_expect(struct remote *remote, uint64_t offset, size_t length, const void *expected)
{
    if (length > LINK_MARK_MOST)
        return EINVAL;
    pthread_mutex_lock(&remote->lock);
    remote->mark = (struct link_mark){.offset = offset, .length = length};
    memcpy(remote->mark.expected, expected, length);
    pthread_mutex_unlock(&remote->lock);
    return 0;
}

void remote_bound(struct remote *remote, uint32_t timeout_ms)
{
    if (timeout_ms < remote->timeout_ms)
        remote->timeout_ms = timeout_ms;
}

void remote_hurry(struct remote *remote)
{
    atomic_store(&remote->last, link_now() + HURRY_MS);
    pthread_mutex_lock(&remote->lock);
    pthread_cond_broadcast(&remote->changed);
    pthread_mutex_unlock(&remote->lock);
    for (unsigned i = 0; i < remote->n_links; i++)
        link_give_up_reads(&remote->links[i]);
}

void remote_look_after(struct remote *remote)
{
    for (unsigned i = 0; i < remote->n_links; i++)
        link_look(&remote->links[i]);
    pthread_mutex_lock(&remote->lock);
    struct link *missing = find_missing(remote);
    if (!pick(remote))
        note_absence(remote);
    if (missing && !remote->connecting && link_now() >= remote->next_try)
        connect_link(remote, missing, bound(remote, link_now() + remote->timeout_ms));
    pthread_mutex_unlock(&remote->lock);
}

void remote_get_status(struct remote *remote, struct remote_status *status)
{
    pthread_mutex_lock(&remote->lock);
    *status = (struct remote_status){
        .size = remote->limits.size,
        .abilities = pack(&remote->limits),
        .read_only = remote->limits.read_only,
        .can_flush = remote->limits.can_flush,
        .can_zero = remote->limits.can_zero,
        .connects = atomic_load(&remote->connects),
        .time_outs = atomic_load(&remote->time_outs),
        .repeats = atomic_load(&remote->repeats),
        .away_ms = remote->away_since ? link_now() - remote->away_since : 0,
    };
    for (unsigned i = 0; i < remote->n_made; i++) {
        status->connections += atomic_load(&remote->links[i].nbd) != NULL;
        status->losses += atomic_load(&remote->links[i].hang_ups);
    }
    memcpy(status->why, remote->why, sizeof status->why);
    pthread_mutex_unlock(&remote->lock);
}
