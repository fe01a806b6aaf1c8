/* SPDX-License-Identifier: BSD-3-Clause */
/* The store that is an NBD server's export. It may go away at any time: each request waits for it
 * as long as it was told to, and is sent again once it is back. Beside tmem.h it is what others see
 * of the core. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct remote;
struct store;

struct remote_config {
    const char *uri;      /* as nbd_connect_uri(3) takes them */
    unsigned connections; /* at most, if the server allows for several: 1 to REMOTE_LINKS */
    uint32_t timeout_ms;  /* how long a request may take */
};

enum { REMOTE_LINKS = 16, REMOTE_WHY = 256 };

/* Not connected yet. 0 or an errno. */
int remote_new(const struct remote_config *config, struct remote **remote);
/* The caller has ended all other calls. */
void remote_free(struct remote *remote);
/* For tm_config. */
struct store *remote_store(struct remote *remote);

/* Connect once, as far as it is not, within the time-out. Returns 0, or an errno and says why.
 * Later connections, made by whoever needs them, must find an export of the same size. */
int remote_connect(struct remote *remote, char *why, size_t why_size);
/* Take the export to be like that, before any connection is made: no other is used. The numbers are
 * as of remote_status. EINVAL: they cannot be. */
int remote_know(struct remote *remote, uint64_t size, uint64_t abilities);
/* Have each later connection look for these bytes, at most 512: a server that comes back as another
 * is not used. EINVAL for more. */
int remote_expect(struct remote *remote, uint64_t offset, size_t length, const void *expected);

/* Bytes of the export, once it was connected. */
uint64_t remote_size(const struct remote *remote);
/* Whether no connection is known to live, or changes must wait for one that was given up. */
bool remote_is_away(struct remote *remote);
/* From now on a change that finds it away is ETIMEDOUT after a second: something else takes it. */
void remote_be_brief(struct remote *remote);
/* A write that nothing else takes has the whole time-out. */
int remote_write_patiently(struct remote *remote, uint64_t offset, size_t length,
                           const void *buffer, bool through);

int remote_read(struct remote *remote, uint64_t offset, size_t length, void *buffer);
/* through: it is durable when this returns. */
int remote_write(struct remote *remote, uint64_t offset, size_t length, const void *buffer,
                 bool through);

/* Before any other call but to connect it: have the time-out be no longer than that. */
void remote_bound(struct remote *remote, uint32_t timeout_ms);
/* Its device is being closed: what is asked for, or waits, is ETIMEDOUT in two seconds, and reads
 * under way are given up. A change that is under way has its time, for it may still come true. */
void remote_hurry(struct remote *remote);

/* Connect again, if it is time to, and notice if the server has left while nobody asked for
 * anything. To be called about twice a second. */
void remote_look_after(struct remote *remote);

struct remote_status {
    uint64_t size, abilities; /* of the export; abilities: for remote_know */
    bool read_only, can_flush, can_zero;
    unsigned connections;      /* now; 0: it is away */
    uint64_t connects, losses; /* of connections, ever */
    uint64_t time_outs;        /* of requests: each was an error */
    uint64_t repeats;          /* requests sent again */
    uint64_t away_ms;          /* since it went away, and 0 if it has not */
    char why[REMOTE_WHY];      /* of the last failure to connect */
};
void remote_get_status(struct remote *remote, struct remote_status *status);
