/* SPDX-License-Identifier: BSD-3-Clause */
/* A way to reach a device: what the load needs of a vhost-user-blk or an NBD connection. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

enum { MAX_DEPTH = 128, MAX_QUEUES = 16 };

enum operation { OP_READ, OP_WRITE, OP_ZERO };

struct request {
    enum operation operation;
    unsigned number; /* below the depth; its own as long as the load runs */
    uint64_t offset; /* in bytes, as is the length */
    uint32_t length;
    uint8_t *buffer; /* its own, in the shared memory, for a block */
    uint8_t *data;   /* what to write, or where to read to: the buffer, or other shared memory */
    bool in_flight, failed;
    uint64_t started; /* CLOCK_MONOTONIC, ns */
};

struct door {
    uint64_t size; /* bytes of the device */

    /* Take a request up; the server learns of it by the next push. */
    void (*submit)(struct door *door, struct request *request);
    void (*push)(struct door *door);
    /* Wait until requests are finished; up to MAX_DEPTH of them. 0: the server has gone. */
    unsigned (*reap)(struct door *door, struct request **finished);
    /* Connect again, and have everything that is in flight carried out. False: nobody listens. */
    bool (*resume)(struct door *door);
};

struct memory;

struct door_config {
    const char *path;      /* of a unix socket */
    const char *export;    /* NBD: its name */
    struct memory *memory; /* vhost: all data lies in it, and so will the rings */
    struct request *requests;
    unsigned depth, queues; /* requests; vhost: virtqueues they are spread over */
    bool spin;              /* look for answers without pause, rather than sleep */
    bool plain;             /* vhost: neither EVENT_IDX nor INDIRECT_DESC */
};

/* Connect. The process ends with a message where that fails. */
struct door *vhost_door(const struct door_config *config);
struct door *nbd_door(const struct door_config *config);
