/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "link.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <libnbd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "fence.h"
#include "tmem.h"

enum {
    REQUEST_MOST = 32 << 20, /* of a server that names no maximum (the NBD protocol's advice) */
    ABSENT_MS = 5000,
};

uint64_t link_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

int link_cond_init(pthread_cond_t *cond)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    int error = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return error;
}

int link_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline)
{
    struct timespec until = {.tv_sec = (time_t)(deadline / 1000),
                             .tv_nsec = (long)(deadline % 1000) * 1000000};
    return pthread_cond_timedwait(cond, lock, &until);
}

int link_init(struct link *link)
{
    *link = (struct link){.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), .late = -1};
    pthread_mutex_init(&link->lock, NULL);
    return link->wake < 0 ? errno : 0;
}

void link_destroy(struct link *link)
{
    nbd_close(link->nbd);
    if (link->wake >= 0)
        close(link->wake);
    if (link->late >= 0)
        close(link->late);
    pthread_mutex_destroy(&link->lock);
}

/* Wait for the socket, or for `wake` if it is not negative. */
static short poll_for(int fd, unsigned direction, int wake, uint64_t deadline)
{
    struct pollfd fds[] = {
        {.fd = fd,
         .events = (short)((direction & LIBNBD_AIO_DIRECTION_READ ? POLLIN : 0) |
                           (direction & LIBNBD_AIO_DIRECTION_WRITE ? POLLOUT : 0))},
        {.fd = wake, .events = POLLIN}};
    uint64_t now = link_now(), left = now < deadline ? deadline - now : 0, woken;
    if (poll(fds, 2, left < 1000 ? (int)left : 1000) <= 0)
        return 0;
    if (fds[1].revents && read(wake, &woken, sizeof woken) < 0)
        return 0;
    return fds[0].revents;
}

/* Let libnbd read or write what it can. */
static void notify(struct nbd_handle *nbd, short events)
{
    unsigned direction = nbd_aio_get_direction(nbd);
    if (events & (POLLIN | POLLHUP | POLLERR) && direction & LIBNBD_AIO_DIRECTION_READ)
        nbd_aio_notify_read(nbd);
    else if (events & (POLLOUT | POLLHUP | POLLERR) && direction & LIBNBD_AIO_DIRECTION_WRITE)
        nbd_aio_notify_write(nbd);
}

static bool has_ended(struct nbd_handle *nbd)
{
    return nbd_aio_is_dead(nbd) || nbd_aio_is_closed(nbd);
}

/* What went wrong, of the call of libnbd that has just failed. */
static int failure(char *error, size_t error_size)
{
    const char *message = nbd_get_error();
    int code = nbd_get_errno();
    snprintf(error, error_size, "%s", message ? message : "the server has hung up");
    return code ? code : ECONNRESET;
}

/* Go on with a connection that is nobody else's until `done`. */
static int pump(struct nbd_handle *nbd, uint64_t deadline, int (*is_done)(struct nbd_handle *),
                char *error, size_t error_size)
{
    while (!is_done(nbd)) {
        if (has_ended(nbd))
            return failure(error, error_size);
        if (link_now() >= deadline) {
            snprintf(error, error_size, "no answer");
            return ETIMEDOUT;
        }
        notify(nbd, poll_for(nbd_aio_get_fd(nbd), nbd_aio_get_direction(nbd), -1, deadline));
    }
    return 0;
}

static int learn(struct nbd_handle *nbd, struct link_limits *limits, char *error, size_t error_size)
{
    int64_t size = nbd_get_size(nbd), least = nbd_get_block_size(nbd, LIBNBD_SIZE_MINIMUM),
            most = nbd_get_block_size(nbd, LIBNBD_SIZE_MAXIMUM);
    if (size < 0 || least < 0 || most < 0)
        return failure(error, error_size);
    *limits = (struct link_limits){
        .size = (uint64_t)size,
        .least = least ? (uint32_t)least : 1,
        .most = most && most < REQUEST_MOST ? (uint32_t)most : REQUEST_MOST,
        .read_only = nbd_is_read_only(nbd) == 1,
        .can_flush = nbd_can_flush(nbd) == 1,
        .can_fua = nbd_can_fua(nbd) == 1,
        .can_zero = nbd_can_zero(nbd) == 1,
        .can_multi_conn = nbd_can_multi_conn(nbd) == 1,
    };
    return 0;
}

static bool is_alike(const struct link_limits *now, const struct link_limits *then)
{
    return now->size == then->size && now->least <= then->least && now->most >= then->most &&
           now->read_only == then->read_only && now->can_flush == then->can_flush &&
           now->can_fua == then->can_fua && now->can_zero == then->can_zero &&
           now->can_multi_conn == then->can_multi_conn;
}

static int check_limits(struct nbd_handle *nbd, struct link_limits *limits, char *error,
                        size_t error_size)
{
    struct link_limits now;
    int failed = learn(nbd, &now, error, error_size);
    if (failed)
        return failed;
    if (now.least > TM_PAGE || now.most < TM_PAGE) {
        snprintf(error, error_size, "it takes requests of %u to %u bytes, and ours have 4096",
                 now.least, now.most);
        return EINVAL;
    }
    if (limits->size && !is_alike(&now, limits)) {
        snprintf(error, error_size,
                 "it is another export than before: of %" PRIu64 " bytes (then %" PRIu64
                 "), or with other abilities",
                 now.size, limits->size);
        return ESTALE;
    }
    *limits = now;
    return 0;
}

static int is_idle(struct nbd_handle *nbd) { return nbd_aio_in_flight(nbd) == 0; }

static int check_mark(struct nbd_handle *nbd, uint64_t deadline, const struct link_mark *mark,
                      uint8_t *found, char *error, size_t error_size)
{
    if (nbd_aio_pread(nbd, found, mark->length, mark->offset, NBD_NULL_COMPLETION, 0) < 0)
        return failure(error, error_size);
    int failed = pump(nbd, deadline, is_idle, error, error_size);
    if (failed || memcmp(found, mark->expected, mark->length) == 0)
        return failed;
    snprintf(error, error_size, "it holds something else than when it was last in use");
    return ESTALE;
}

/* Over TCP a host that is gone, or cannot be reached, is a lost connection after some seconds. One
 * that answers for a server that hangs is not. Elsewhere these options fail, and nothing is lost.
 */
static void notice_absence(int fd)
{
    int on = 1, seconds = ABSENT_MS / 1000;
    unsigned ms = ABSENT_MS;
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms);
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof seconds);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &seconds, sizeof seconds);
}

/* No structured replies: with them qemu-nbd looks for holes before each read (RBD, 16 in flight: a
 * quarter as many reads a second), and hangs up instead of answering an error. */
static int connect_to(struct nbd_handle *nbd, const char *uri, uint64_t deadline,
                      struct link_limits *limits, char *error, size_t error_size)
{
    if (nbd_set_uri_allow_local_file(nbd, true) < 0 || nbd_set_pread_initialize(nbd, false) < 0 ||
        nbd_set_request_structured_replies(nbd, false) < 0 || nbd_aio_connect_uri(nbd, uri) < 0)
        return failure(error, error_size);
    int failed = pump(nbd, deadline, nbd_aio_is_ready, error, error_size);
    if (!failed)
        notice_absence(nbd_aio_get_fd(nbd));
    return failed ? failed : check_limits(nbd, limits, error, error_size);
}

int link_open(struct link *link, const char *uri, uint64_t deadline, const struct link_mark *mark,
              struct link_limits *limits, char *error, size_t error_size)
{
    uint8_t found[LINK_MARK_MOST] = {0};
    struct nbd_handle *nbd = nbd_create();
    if (!nbd)
        return failure(error, error_size);
    int failed = connect_to(nbd, uri, deadline, limits, error, error_size);
    if (!failed && mark->length)
        failed = check_mark(nbd, deadline, mark, found, error, error_size);
    if (failed) {
        nbd_close(nbd);
        return failed;
    }
    pthread_mutex_lock(&link->lock);
    link->doomed = false;
    atomic_store(&link->nbd, nbd);
    pthread_mutex_unlock(&link->lock);
    return 0;
}

/* The functions below are called with link->lock held. */

static void take_off(struct link *link, struct link_request *request)
{
    struct link_request **at = &link->requests;
    while (*at && *at != request)
        at = &(*at)->next;
    if (!*at)
        return;
    *at = request->next;
    atomic_fetch_sub(&link->in_flight, 1);
}

static void finish(struct link *link, struct link_request *request, int error)
{
    take_off(link, request);
    request->error = error;
    request->done = true;
    pthread_cond_signal(&request->turn);
}

static bool has_changes(const struct link *link)
{
    const struct link_request *request = link->requests;
    while (request && !link_is_change(request->op))
        request = request->next;
    return request != NULL;
}

/* Whether it must not be sent any more, however long it has waited for that. */
static bool is_fenced(const struct link_request *request)
{
    return request && request->fence && fence_is_reached(request->fence);
}

/* Whether something that waits to be sent, in libnbd or in the socket, must not be any more. */
static bool has_fenced(const struct link *link)
{
    const struct link_request *request = link->requests;
    while (request && !request->fence)
        request = request->next;
    return is_fenced(request);
}

/* What was sent in whole the server may make when it likes, until it closes the connection. */
static void keep_late(struct link *link)
{
    if (link->late >= 0 || !has_changes(link))
        return;
    link->late = fcntl(nbd_aio_get_fd(link->nbd), F_DUPFD_CLOEXEC, 0);
    shutdown(link->late, SHUT_WR);
}

/* Nobody polls, or who does calls this. libnbd calls nobody back afterwards, and no longer touches
 * the buffers. */
static void hang_up(struct link *link)
{
    if (!has_ended(link->nbd))
        keep_late(link);
    nbd_close(link->nbd);
    atomic_store(&link->nbd, NULL);
    atomic_fetch_add(&link->hang_ups, 1);
    while (link->requests)
        finish(link, link->requests, ENOTCONN);
}

static void have_poller_look(struct link *link)
{
    uint64_t one = 1;
    if (link->polled && write(link->wake, &one, sizeof one) < 0)
        return; /* it is full: there is enough to wake it */
}

/* Hang up what is over, or have who polls do it, whose handle it is meanwhile. */
static void hang_up_if_over(struct link *link)
{
    if (!link->nbd || !(link->doomed || has_ended(link->nbd)))
        return;
    link->doomed = true;
    if (link->polled)
        have_poller_look(link);
    else
        hang_up(link);
}

static void give_up(struct link *link)
{
    link->doomed = true;
    hang_up_if_over(link);
}

struct answered {
    struct link *link;
    struct link_request *request;
};

static int answer(void *user_data, int *error)
{
    struct answered *answered = user_data;
    finish(answered->link, answered->request, *error);
    return 1; /* libnbd forgets it */
}

static int64_t issue(struct nbd_handle *nbd, const struct link_request *request,
                     nbd_completion_callback callback)
{
    switch (request->op) {
    case LINK_READ:
        return nbd_aio_pread(nbd, request->buffer, request->length, request->offset, callback,
                             request->flags);
    case LINK_WRITE:
        return nbd_aio_pwrite(nbd, request->buffer, request->length, request->offset, callback,
                              request->flags);
    case LINK_ZERO:
        return nbd_aio_zero(nbd, request->length, request->offset, callback, request->flags);
    default:
        return nbd_aio_flush(nbd, callback, request->flags);
    }
}

/* Hand the request to libnbd, which sends as much as the socket takes. */
static void begin(struct link *link, struct link_request *request, struct answered *answered)
{
    request->next = link->requests;
    link->requests = request;
    atomic_fetch_add(&link->in_flight, 1);
    nbd_completion_callback callback = {.callback = answer, .user_data = answered};
    if (issue(link->nbd, request, callback) < 0)
        finish(link, request, has_ended(link->nbd) ? ENOTCONN : nbd_get_errno());
    else if (nbd_aio_get_direction(link->nbd) & LIBNBD_AIO_DIRECTION_WRITE)
        have_poller_look(link);
}

static void poll_once(struct link *link, uint64_t deadline)
{
    struct nbd_handle *nbd = link->nbd;
    int fd = nbd_aio_get_fd(nbd);
    unsigned direction = nbd_aio_get_direction(nbd);
    link->polled = true;
    pthread_mutex_unlock(&link->lock);
    short events = poll_for(fd, direction, link->wake, deadline);
    pthread_mutex_lock(&link->lock);
    link->polled = false;
    if (has_fenced(link))
        link->doomed = true;
    else if (events)
        notify(nbd, events);
    hang_up_if_over(link);
}

static void await(struct link *link, struct link_request *request, uint64_t deadline)
{
    while (!request->done) {
        if (link_now() >= deadline && !link->doomed)
            give_up(link);
        else if (link->polled) /* who polls is woken, and hangs up what is doomed */
            link_cond_wait(&request->turn, &link->lock,
                           link->doomed ? link_now() + 1000 : deadline);
        else
            poll_once(link, deadline);
    }
    if (link->requests && !link->polled)
        pthread_cond_signal(&link->requests->turn);
}

int link_run(struct link *link, struct link_request *request, uint64_t deadline)
{
    struct answered answered = {link, request};
    request->done = false;
    request->error = ENOTCONN;
    link_cond_init(&request->turn);
    pthread_mutex_lock(&link->lock);
    hang_up_if_over(link);
    if (is_fenced(request)) {
        request->error = EIO;
    } else if (link->nbd && !link->doomed) {
        begin(link, request, &answered);
        await(link, request, deadline);
    }
    if (request->error == ESHUTDOWN && link->nbd && !link->doomed)
        give_up(link); /* a server that is about to end refuses what is asked of it */
    pthread_mutex_unlock(&link->lock);
    pthread_cond_destroy(&request->turn);
    return request->error == ESHUTDOWN ? ENOTCONN : request->error;
}

void link_give_up_reads(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    if (link->nbd && link->requests && !has_changes(link))
        give_up(link);
    pthread_mutex_unlock(&link->lock);
}

int link_late(struct link *link)
{
    char answers[TM_PAGE];
    ssize_t n = 0;
    if (atomic_load(&link->late) < 0)
        return -1;
    pthread_mutex_lock(&link->lock);
    int late = atomic_load(&link->late);
    while (late >= 0 && (n = recv(late, answers, sizeof answers, MSG_DONTWAIT)) > 0)
        ;
    if (late >= 0 && (n == 0 || (errno != EAGAIN && errno != EINTR))) {
        close(late);
        atomic_store(&link->late, late = -1);
    }
    pthread_mutex_unlock(&link->lock);
    return late;
}

void link_look(struct link *link)
{
    pthread_mutex_lock(&link->lock);
    if (link->nbd && !link->polled) {
        short events = poll_for(nbd_aio_get_fd(link->nbd), LIBNBD_AIO_DIRECTION_READ, -1, 0);
        if (events && !has_fenced(link))
            notify(link->nbd, events);
        hang_up_if_over(link);
    }
    pthread_mutex_unlock(&link->lock);
}
