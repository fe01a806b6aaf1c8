/* SPDX-License-Identifier: BSD-3-Clause */
/* Messages of vhost-user as they are on the socket, received and sent. One thread. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* vhost-user, 'Front-end message types'. */
enum vhost_request {
    VHOST_GET_FEATURES = 1,
    VHOST_SET_FEATURES = 2,
    VHOST_SET_OWNER = 3,
    VHOST_RESET_OWNER = 4,
    VHOST_SET_MEM_TABLE = 5,
    VHOST_SET_VRING_NUM = 8,
    VHOST_SET_VRING_ADDR = 9,
    VHOST_SET_VRING_BASE = 10,
    VHOST_GET_VRING_BASE = 11,
    VHOST_SET_VRING_KICK = 12,
    VHOST_SET_VRING_CALL = 13,
    VHOST_SET_VRING_ERR = 14,
    VHOST_GET_PROTOCOL_FEATURES = 15,
    VHOST_SET_PROTOCOL_FEATURES = 16,
    VHOST_GET_QUEUE_NUM = 17,
    VHOST_SET_VRING_ENABLE = 18,
    VHOST_SET_BACKEND_REQ_FD = 21,
    VHOST_GET_CONFIG = 24,
    VHOST_SET_CONFIG = 25,
    VHOST_GET_INFLIGHT_FD = 31,
    VHOST_SET_INFLIGHT_FD = 32,
    VHOST_RESET_DEVICE = 34,
};

/* vhost-user, 'Protocol features'. */
#define VHOST_PROTOCOL_MQ (UINT64_C(1) << 0)
#define VHOST_PROTOCOL_REPLY_ACK (UINT64_C(1) << 3)
#define VHOST_PROTOCOL_BACKEND_REQ (UINT64_C(1) << 5)
#define VHOST_PROTOCOL_CONFIG (UINT64_C(1) << 9)
#define VHOST_PROTOCOL_INFLIGHT (UINT64_C(1) << 12)
#define VHOST_PROTOCOL_RESET (UINT64_C(1) << 13)
#define VHOST_F_PROTOCOL_FEATURES (UINT64_C(1) << 30) /* among the virtio features */

enum {
    VHOST_VERSION = 1,
    VHOST_VERSION_MASK = 3,
    VHOST_REPLY = 4,      /* flag: this is a reply */
    VHOST_NEED_REPLY = 8, /* flag: with REPLY_ACK, say whether it went well */
    VHOST_NO_FD = 0x100,  /* of a vring's descriptor: none comes with it */
    VHOST_MAX_FDS = 8,
    VHOST_MAX_REGIONS = 8,
    VHOST_CONFIG_MAX = 256,
};

struct vhost_vring_state {
    uint32_t index, num;
};

struct vhost_vring_address {
    uint32_t index, flags;
    uint64_t descriptors, used, available, log;
};

struct vhost_region {
    uint64_t guest, bytes, user, offset; /* guest physical, front end's, and in the file */
};

struct vhost_memory_table {
    uint32_t n, padding;
    struct vhost_region regions[VHOST_MAX_REGIONS];
};

struct vhost_device_config {
    uint32_t offset, size, flags;
    uint8_t bytes[VHOST_CONFIG_MAX];
};

struct vhost_inflight_area {
    uint64_t bytes, offset;
    uint16_t n_queues, queue_size;
};

union vhost_payload {
    uint64_t u64;
    struct vhost_vring_state state;
    struct vhost_vring_address address;
    struct vhost_memory_table memory;
    struct vhost_device_config config;
    struct vhost_inflight_area inflight;
};

struct vhost_message {
    uint32_t request, flags, size;
    union vhost_payload payload;
    int fds[VHOST_MAX_FDS]; /* -1: none, or taken */
    unsigned n_fds;
};

/* Wait for the next message. Returns 0, -1 when the other side has left, or an errno; what it came
 * with is to be released. EPROTO: it is none of ours; ETIMEDOUT: half of it never came. */
int protocol_receive(int socket, struct vhost_message *message);
/* Send a message back as a reply, with `fd` unless it is -1. Returns 0 or an errno. */
int protocol_reply(int socket, struct vhost_message *message, uint32_t size, int fd);
/* The descriptor that came, now the caller's; -1: none. */
int protocol_take_fd(struct vhost_message *message);
/* Close the descriptors that nobody took. */
void protocol_release(struct vhost_message *message);
