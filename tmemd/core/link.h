/* SPDX-License-Identifier: BSD-3-Clause */
/* One connection to an NBD server, by libnbd. It has no thread: of those who wait for an answer one
 * polls for all, and hands that on when it has its own. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fence;
struct nbd_handle;

enum link_op { LINK_READ, LINK_WRITE, LINK_ZERO, LINK_FLUSH };

static inline bool link_is_change(enum link_op op) { return op == LINK_WRITE || op == LINK_ZERO; }

/* A request, on the stack of who waits for it. */
struct link_request {
    enum link_op op;
    uint32_t flags; /* LIBNBD_CMD_FLAG_* */
    uint64_t offset;
    size_t length;
    void *buffer;
    bool patient;              /* of a change, for who sends it: nothing else takes it */
    const struct fence *fence; /* of a change: it is EIO once this is reached. NULL: none */
    int error;                 /* ENOTCONN: the connection was lost */
    bool done;
    pthread_cond_t turn; /* it is done, or its owner is to poll */
    struct link_request *next;
};

struct link_limits {
    uint64_t size;
    uint32_t least, most; /* bytes of a request: its alignment and maximum */
    bool read_only, can_flush, can_fua, can_zero, can_multi_conn;
};

struct link {
    pthread_mutex_t lock; /* guards all that follows, and is held over each call of libnbd */
    struct nbd_handle *_Atomic nbd; /* NULL: not connected; is looked at without the lock, too */
    _Atomic unsigned in_flight;
    struct link_request *requests; /* in flight */
    bool polled;                   /* one of their owners polls */
    _Atomic bool doomed;           /* to be closed by who polls; is looked at likewise */
    int wake;                      /* an eventfd: has who polls look again */
    _Atomic uint64_t hang_ups;     /* how often the connection was lost */
    _Atomic int late; /* a connection that was given up while changes were under way; -1: none */
};

int link_init(struct link *link);
void link_destroy(struct link *link);

/* What an export must hold at an offset; of length 0: anything. */
enum { LINK_MARK_MOST = 512 };
struct link_mark {
    uint64_t offset;
    size_t length;
    uint8_t expected[LINK_MARK_MOST];
};

/* Connect by `deadline` (link_now). *limits are what the export must be like, or if their size is 0
 * are filled in. Returns 0, or an errno and says in `error` what was wrong; ESTALE: it is another
 * export. One caller at a time, of a link that is not connected. */
int link_open(struct link *link, const char *uri, uint64_t deadline, const struct link_mark *mark,
              struct link_limits *limits, char *error, size_t error_size);
/* Send the request and wait for its answer until `deadline`, when the connection is given up, and
 * with it what else is under way there. Returns its error; ENOTCONN: ask again elsewhere. */
int link_run(struct link *link, struct link_request *request, uint64_t deadline);
/* Give it up if nothing but reads is under way. */
void link_give_up_reads(struct link *link);
/* A socket to poll for, as long as the server may still make changes that were under way when their
 * connection was given up: it has not closed that. -1: there are none. */
int link_late(struct link *link);
/* Notice whether the server has left, if nobody polls. */
void link_look(struct link *link);

/* Milliseconds of a clock that only goes forward, and the same for pthread_cond_timedwait. */
uint64_t link_now(void);
int link_cond_init(pthread_cond_t *cond);
int link_cond_wait(pthread_cond_t *cond, pthread_mutex_t *lock, uint64_t deadline);
