/* SPDX-License-Identifier: BSD-3-Clause */
/* A front end and its guest in the process of the back end: vhost_serve runs in a thread at the
 * other end of a socket pair. One thread each. */
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "../core/fixture.h"
#include "block.h"

/* The guest's memory is one file in two regions that are neighbours. The first holds the rings. */
enum {
    MEMORY = 4 << 20,
    HALF = MEMORY / 2,
    RINGS = 64 << 10,
    AVAILABLE = 16 << 10,
    USED = 24 << 10
};
#define GUEST UINT64_C(0x40000000)
#define USER UINT64_C(0x7f0000000000)

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { NO_ANSWER = 0xff, ENDED = -1 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};
struct available {
    uint16_t flags, index, ring[];
};
struct used {
    uint16_t flags, index;
    struct {
        uint32_t head, written;
    } ring[];
};
struct header {
    uint32_t type, reserved;
    uint64_t sector;
};
struct range {
    uint64_t sector;
    uint32_t n_sectors, flags;
};

struct front {
    struct vhost_config config;
    int socket, served; /* the two ends */
    pthread_t server;
    int result; /* of vhost_serve, with what it says of it */
    char error[256];
    uint16_t size; /* of each queue */
    int fd;        /* of the memory */
    uint8_t *memory;
    int kick[VIRTQUEUES], call[VIRTQUEUES];
    uint16_t seen[VIRTQUEUES]; /* answers that were taken in */
};

static inline void *front_serve(void *argument)
{
    struct front *front = argument;
    front->result = vhost_serve(&front->config, front->served, front->error, sizeof front->error);
    shutdown(front->served, SHUT_RDWR);
    return NULL;
}

/* Connect, with memory of its own; nothing has been said yet. */
static inline struct front *front_open(const struct vhost_config *config)
{
    struct front *front = calloc(1, sizeof *front);
    int ends[2];
    CHECK(front && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    front->config = *config;
    front->socket = ends[0];
    front->served = ends[1];
    front->fd = memory_file(MEMORY);
    front->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED, front->fd, 0);
    CHECK(front->memory != MAP_FAILED);
    memset(front->kick, -1, sizeof front->kick);
    memset(front->call, -1, sizeof front->call);
    CHECK(pthread_create(&front->server, NULL, front_serve, front) == 0);
    return front;
}

/* Hang up. Returns what vhost_serve returned; *error, unless it is NULL, what it said. */
static inline int front_close(struct front *front, char *error)
{
    shutdown(front->socket, SHUT_RDWR);
    CHECK(pthread_join(front->server, NULL) == 0);
    int result = front->result;
    if (error)
        memcpy(error, front->error, sizeof front->error);
    for (int i = 0; i < VIRTQUEUES; i++) {
        close(front->kick[i]);
        close(front->call[i]);
    }
    close(front->socket);
    close(front->served);
    close(front->fd);
    munmap(front->memory, MEMORY);
    free(front);
    return result;
}

/* --- Messages --- */

/* Send bytes with descriptors; whether they went out. */
static inline bool front_send_bytes(struct front *front, const void *bytes, size_t length,
                                    const int *fds, unsigned n_fds)
{
    union {
        char bytes[CMSG_SPACE(64 * sizeof(int))];
        struct cmsghdr align;
    } control = {{0}};
    struct iovec iov = {(void *)bytes, length};
    struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
    if (n_fds) {
        message.msg_control = control.bytes;
        message.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
        control.align = (struct cmsghdr){.cmsg_len = CMSG_LEN(n_fds * sizeof(int)),
                                         .cmsg_level = SOL_SOCKET,
                                         .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.align), fds, n_fds * sizeof(int));
    }
    return sendmsg(front->socket, &message, MSG_NOSIGNAL) == (ssize_t)length;
}

/* The header, and the payload behind it, as they are on the socket. */
struct wire {
    uint32_t request, flags, size;
    union vhost_payload payload;
} __attribute__((packed));
enum { WIRE_HEADER = 12 };

static inline bool front_send(struct front *front, const struct wire *wire, const int *fds,
                              unsigned n_fds)
{
    return front_send_bytes(front, wire, WIRE_HEADER + wire->size, fds, n_fds);
}

/* Receive a reply, and its descriptor or -1. False: the connection has ended. */
static inline bool front_receive(struct front *front, struct wire *wire, int *fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {wire, WIRE_HEADER};
    struct msghdr message = {.msg_iov = &iov,
                             .msg_iovlen = 1,
                             .msg_control = control.bytes,
                             .msg_controllen = sizeof control.bytes};
    *fd = -1;
    if (recvmsg(front->socket, &message, MSG_WAITALL) != WIRE_HEADER)
        return false;
    if (CMSG_FIRSTHDR(&message))
        memcpy(fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof *fd);
    CHECK(wire->flags == (VHOST_VERSION | VHOST_REPLY) && wire->size <= sizeof wire->payload);
    return recv(front->socket, &wire->payload, wire->size, MSG_WAITALL) == (ssize_t)wire->size;
}

/* Make a setting. Returns 0, 1: it was refused, or ENDED. */
static inline int front_set(struct front *front, uint32_t request, const void *payload,
                            uint32_t size, const int *fds, unsigned n_fds)
{
    struct wire wire = {request, VHOST_VERSION | VHOST_NEED_REPLY, size, {0}};
    int fd;
    memcpy(&wire.payload, payload, size);
    if (!front_send(front, &wire, fds, n_fds) || !front_receive(front, &wire, &fd))
        return ENDED;
    CHECK(wire.request == request && wire.size == 8 && wire.payload.u64 <= 1);
    return (int)wire.payload.u64;
}

static inline int front_set_u64(struct front *front, uint32_t request, uint64_t value)
{
    return front_set(front, request, &value, sizeof value, NULL, 0);
}

static inline int front_set_state(struct front *front, uint32_t request, uint32_t queue,
                                  uint32_t num)
{
    struct vhost_vring_state state = {queue, num};
    return front_set(front, request, &state, sizeof state, NULL, 0);
}

static inline int front_set_fd(struct front *front, uint32_t request, uint64_t queue, int fd)
{
    return front_set(front, request, &queue, sizeof queue, &fd, 1);
}

/* Ask for something, with a payload that is sent and replaced. Returns the descriptor, -1: none. */
static inline int front_get(struct front *front, uint32_t request, struct wire *wire, uint32_t size)
{
    int fd;
    wire->request = request;
    wire->flags = VHOST_VERSION;
    wire->size = size;
    CHECK(front_send(front, wire, NULL, 0) && front_receive(front, wire, &fd));
    return fd;
}

/* --- Set-up --- */

static inline struct vhost_memory_table front_table(void)
{
    return (struct vhost_memory_table){
        .n = 2, .regions = {{GUEST, HALF, USER, 0}, {GUEST + HALF, HALF, USER + HALF, HALF}}};
}

static inline int front_share(struct front *front)
{
    struct vhost_memory_table table = front_table();
    return front_set(front, VHOST_SET_MEM_TABLE, &table, 8 + 2 * sizeof *table.regions,
                     (int[]){front->fd, front->fd}, 2);
}

static inline struct vhost_vring_address front_rings(uint32_t queue)
{
    uint64_t base = USER + queue * RINGS;
    return (struct vhost_vring_address){
        .index = queue, .descriptors = base, .available = base + AVAILABLE, .used = base + USED};
}

static inline int front_set_address(struct front *front, uint32_t queue)
{
    struct vhost_vring_address address = front_rings(queue);
    return front_set(front, VHOST_SET_VRING_ADDR, &address, sizeof address, NULL, 0);
}

static inline int front_agree(struct front *front, uint64_t features)
{
    /* No acknowledgements before they are agreed upon. */
    struct wire wire = {VHOST_SET_PROTOCOL_FEATURES, VHOST_VERSION, 8, {0}};
    wire.payload.u64 = VHOST_PROTOCOL_MQ | VHOST_PROTOCOL_REPLY_ACK | VHOST_PROTOCOL_CONFIG |
                       VHOST_PROTOCOL_INFLIGHT | VHOST_PROTOCOL_RESET;
    CHECK(front_send(front, &wire, NULL, 0));
    return front_set_u64(front, VHOST_SET_FEATURES,
                         features | VIRTIO_F_VERSION_1 | VHOST_F_PROTOCOL_FEATURES);
}

/* The settings of a queue up to its kick, which starts it. */
static inline void front_add_queue(struct front *front, uint32_t queue, uint16_t size)
{
    front->size = size;
    front->kick[queue] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    front->call[queue] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(front_set_state(front, VHOST_SET_VRING_NUM, queue, size) == 0);
    CHECK(front_set_state(front, VHOST_SET_VRING_BASE, queue, 0) == 0);
    CHECK(front_set_address(front, queue) == 0);
    CHECK(front_set_fd(front, VHOST_SET_VRING_CALL, queue, front->call[queue]) == 0);
    CHECK(front_set_state(front, VHOST_SET_VRING_ENABLE, queue, 1) == 0);
    CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, queue, front->kick[queue]) == 0);
}

/* All of it, with one queue. */
static inline struct front *front_begin(const struct vhost_config *config, uint64_t features,
                                        uint16_t size)
{
    struct front *front = front_open(config);
    CHECK(front_agree(front, features) == 0 && front_share(front) == 0);
    front_add_queue(front, 0, size);
    return front;
}

/* --- Rings --- */

static inline struct descriptor *front_descriptors(struct front *front, uint32_t queue)
{
    return (struct descriptor *)(front->memory + queue * RINGS);
}

static inline struct available *front_available(struct front *front, uint32_t queue)
{
    return (struct available *)(front->memory + queue * RINGS + AVAILABLE);
}

static inline struct used *front_used(struct front *front, uint32_t queue)
{
    return (struct used *)(front->memory + queue * RINGS + USED);
}

static inline uint16_t front_used_index(struct front *front, uint32_t queue)
{
    return __atomic_load_n(&front_used(front, queue)->index, __ATOMIC_ACQUIRE);
}

static inline void front_kick(struct front *front, uint32_t queue)
{
    CHECK(write(front->kick[queue], &(uint64_t){1}, 8) == 8 || errno == EAGAIN);
}

static inline void front_offer(struct front *front, uint32_t queue, uint16_t head)
{
    struct available *available = front_available(front, queue);
    available->ring[available->index % front->size] = head;
    __atomic_store_n(&available->index, (uint16_t)(available->index + 1), __ATOMIC_RELEASE);
    front_kick(front, queue);
}

/* Wait for so many answers. False: the connection has ended first. */
static inline bool front_wait(struct front *front, uint32_t queue, uint16_t n)
{
    struct pollfd events[] = {{.fd = front->call[queue], .events = POLLIN},
                              {.fd = front->socket, .events = POLLRDHUP}};
    while ((uint16_t)(front_used_index(front, queue) - front->seen[queue]) < n) {
        CHECK(poll(events, 2, -1) > 0);
        if (events[1].revents)
            return false;
        CHECK(read(front->call[queue], &(uint64_t){0}, 8) == 8);
    }
    front->seen[queue] += n;
    return true;
}

/* The parts of a request at its place in the second region, one place for each head. */
enum { PLACES = HALF + (64 << 10), PLACE = 16 << 10 };
enum { HEADER_AT = 0, STATUS_AT = 512, DATA_AT = 4096, DATA_BYTES = 8192 };
static inline uint8_t *front_place(struct front *front, uint16_t head)
{
    return front->memory + PLACES + (size_t)head * PLACE;
}

static inline uint64_t front_address(const struct front *front, const void *at)
{
    return GUEST + (uint64_t)((const uint8_t *)at - front->memory);
}

/* Describe a request by three descriptors from its head on. */
static inline void front_describe(struct front *front, uint32_t queue, uint16_t head, uint32_t type,
                                  uint64_t sector, uint32_t length)
{
    uint8_t *place = front_place(front, head);
    uint64_t at = front_address(front, place);
    struct descriptor *descriptors = front_descriptors(front, queue) + head;
    uint16_t data = type == IN || type == GET_ID ? WRITE : 0;
    memcpy(place + HEADER_AT, &(struct header){type, 0, sector}, sizeof(struct header));
    place[STATUS_AT] = NO_ANSWER;
    descriptors[0] = (struct descriptor){at + HEADER_AT, 16, NEXT, head + 1};
    descriptors[1] = (struct descriptor){at + DATA_AT, length, NEXT | data, head + 2};
    descriptors[2] = (struct descriptor){at + STATUS_AT, 1, WRITE, 0};
}

/* A whole request; returns its status, or NO_ANSWER when the connection has ended. */
static inline uint8_t front_do(struct front *front, uint32_t type, uint64_t sector, uint32_t length)
{
    front_describe(front, 0, 0, type, sector, length);
    front_offer(front, 0, 0);
    return front_wait(front, 0, 1) ? front_place(front, 0)[STATUS_AT] : NO_ANSWER;
}
