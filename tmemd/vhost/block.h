/* SPDX-License-Identifier: BSD-3-Clause */
/* Requests of virtio-blk (virtio 5.2), and the device's configuration space. */
#pragma once

#include "vhost.h"
#include "virtqueue.h"

/* virtio 5.2.3 */
#define VIRTIO_BLK_F_SEG_MAX (UINT64_C(1) << 2)
#define VIRTIO_BLK_F_RO (UINT64_C(1) << 5)
#define VIRTIO_BLK_F_BLK_SIZE (UINT64_C(1) << 6)
#define VIRTIO_BLK_F_FLUSH (UINT64_C(1) << 9)
#define VIRTIO_BLK_F_TOPOLOGY (UINT64_C(1) << 10)
#define VIRTIO_BLK_F_CONFIG_WCE (UINT64_C(1) << 11)
#define VIRTIO_BLK_F_MQ (UINT64_C(1) << 12)
#define VIRTIO_BLK_F_DISCARD (UINT64_C(1) << 13)
#define VIRTIO_BLK_F_WRITE_ZEROES (UINT64_C(1) << 14)

enum { BLOCK_BUFFER = 256 << 10, BLOCK_RANGES = 16 };

/* Parts of the guest's memory. */
struct parts {
    struct iovec *at;
    unsigned n;
};

struct block_range {
    uint64_t offset, count; /* bytes of the device */
};

/* A request, copied out of the chain and checked. */
struct block_request {
    enum tm_op op;
    bool is_get_id;
    uint64_t offset, count; /* bytes of the device, unless there are ranges */
    struct block_range ranges[BLOCK_RANGES];
    unsigned n_ranges;
    struct parts out, in; /* what the guest sends, and what it is given: data alone */
    uint8_t *answer;      /* where its status belongs */
    uint32_t failed;      /* the status, unless it is 0 */
    uint32_t written;     /* bytes the guest was given, once it is done */
};

/* What the device offers. */
uint64_t block_features(const struct vhost_config *config);
/* Fill *to from `offset` of the configuration space on; zeros behind its end. */
void block_config(const struct vhost_config *config, bool write_back, uint32_t offset, uint8_t *to,
                  uint32_t size);
/* Whether a write of the configuration space is one of the byte that may be written. */
bool block_is_write_back_byte(uint32_t offset, uint32_t size);

/* Look at what is asked, whose data stays in the chain. False: there is not even a place for an
 * answer. */
bool block_parse(const struct vhost_config *config, struct chain *chain,
                 struct block_request *request);
/* Whether it is likely to wait for the file. */
bool block_may_wait(const struct vhost_config *config, const struct block_request *request);
/* Do it, by way of a buffer of BLOCK_BUFFER bytes, and write the status. `sync`: what is written is
 * to be durable. */
void block_execute(const struct vhost_config *config, struct block_request *request,
                   uint8_t *buffer, bool sync);
