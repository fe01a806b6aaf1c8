/* SPDX-License-Identifier: BSD-3-Clause */
/* A vhost-user-blk front end: QEMU's part of the protocol, for one device and no guest. Written
 * from the 'Vhost-user Protocol' (QEMU's docs/interop/vhost-user.rst) and virtio 1.2, 5.2. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/virtio_config.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "door.h"
#include "memory.h"
#include "ring.h"

/* 'Front-end message types' */
enum {
    GET_FEATURES = 1,
    SET_FEATURES = 2,
    SET_OWNER = 3,
    SET_MEM_TABLE = 5,
    SET_VRING_NUM = 8,
    SET_VRING_ADDR = 9,
    SET_VRING_BASE = 10,
    SET_VRING_KICK = 12,
    SET_VRING_CALL = 13,
    GET_PROTOCOL_FEATURES = 15,
    SET_PROTOCOL_FEATURES = 16,
    GET_QUEUE_NUM = 17,
    SET_VRING_ENABLE = 18,
    GET_CONFIG = 24,
    GET_INFLIGHT_FD = 31,
    SET_INFLIGHT_FD = 32,
};

/* 'Protocol features' */
#define PROTOCOL_F_MQ (UINT64_C(1) << 0)
#define PROTOCOL_F_REPLY_ACK (UINT64_C(1) << 3)
#define PROTOCOL_F_CONFIG (UINT64_C(1) << 9)
#define PROTOCOL_F_INFLIGHT_SHMFD (UINT64_C(1) << 12)

#define F_PROTOCOL_FEATURES (UINT64_C(1) << 30)
#define F_VERSION_1 (UINT64_C(1) << VIRTIO_F_VERSION_1)
#define F_EVENT_IDX (UINT64_C(1) << VIRTIO_RING_F_EVENT_IDX)
#define F_INDIRECT (UINT64_C(1) << VIRTIO_RING_F_INDIRECT_DESC)
#define F_MQ (UINT64_C(1) << VIRTIO_BLK_F_MQ)
#define F_WRITE_ZEROES (UINT64_C(1) << VIRTIO_BLK_F_WRITE_ZEROES)

/* 'Header' */
enum { VERSION = 1, NEED_REPLY = 1 << 3 };
struct header {
    uint32_t request, flags, size;
};

/* 'Vring state description' */
struct vring_state {
    uint32_t index, value;
};

/* 'Vring address description' */
struct vring_address {
    uint32_t index, flags;
    uint64_t descriptors, used, available, log;
};

/* 'Memory region description', in a table of one */
struct memory_table {
    uint32_t n_regions, padding;
    uint64_t guest_address, size, user_address, mmap_offset;
};

/* 'Inflight description' */
struct inflight {
    uint64_t mmap_size, mmap_offset;
    uint16_t num_queues, queue_size;
};

/* 'Virtio device config space', with as much of 5.2.4 as is of use here */
struct config {
    uint32_t offset, size, flags;
    struct {
        uint64_t capacity;
        uint8_t others[26];
        uint16_t num_queues;
    } __attribute__((packed)) space;
} __attribute__((packed));

struct vhost {
    struct door door;
    struct door_config config;
    struct ring rings[MAX_QUEUES];
    int socket, epoll;
    bool broken; /* the server went while it was spoken to */
    uint64_t features, protocol_features;
    struct inflight inflight;
    int inflight_fd;
};

static bool offers(const struct vhost *vhost, uint64_t protocol_feature)
{
    return vhost->protocol_features & protocol_feature;
}

/* The server is not of use here, unless it has just gone: its successor may be. */
static void refuse(const struct vhost *vhost, const char *why)
{
    if (!vhost->broken)
        die(vhost->config.path, why);
}

/* The descriptor, unless it is -1, goes as ancillary data with the message. */
static void send_message(struct vhost *vhost, struct header header, const void *payload, int fd)
{
    struct iovec parts[] = {{&header, sizeof header}, {(void *)payload, header.size}};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof fd)];
    } control = {.room = {0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};

    if (fd >= 0) {
        message.msg_control = control.room;
        message.msg_controllen = sizeof control.room;
        control.header = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.header), &fd, sizeof fd);
    }
    if (sendmsg(vhost->socket, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof header + header.size))
        vhost->broken = true;
}

/* Returns the descriptor that came with it, or -1. */
static int receive_reply(struct vhost *vhost, uint32_t request, void *payload, uint32_t size)
{
    struct header header = {0};
    struct iovec parts[] = {{&header, sizeof header}, {payload, size}};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr message = {.msg_iov = parts,
                             .msg_iovlen = 2,
                             .msg_control = control.room,
                             .msg_controllen = sizeof control.room};
    ssize_t wanted = sizeof header + size;
    int fd = -1;

    if (recvmsg(vhost->socket, &message, MSG_WAITALL | MSG_CMSG_CLOEXEC) != wanted)
        vhost->broken = true;
    if (header.request != request || header.size != size)
        refuse(vhost, "a reply is not what was asked for");
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    if (rights && rights->cmsg_type == SCM_RIGHTS)
        memcpy(&fd, CMSG_DATA(rights), sizeof fd);
    return fd;
}

/* Send a message, and wait for its answer into `payload` itself. */
static int ask(struct vhost *vhost, uint32_t request, void *payload, uint32_t sent, uint32_t size)
{
    send_message(vhost, (struct header){request, VERSION, sent}, payload, -1);
    return receive_reply(vhost, request, payload, size);
}

static uint64_t ask_number(struct vhost *vhost, uint32_t request)
{
    uint64_t number = 0;
    ask(vhost, request, &number, 0, sizeof number);
    return number;
}

/* Send a message that has no answer but, where the server can, that it was obeyed. */
static void tell(struct vhost *vhost, uint32_t request, const void *payload, uint32_t size, int fd)
{
    bool acknowledged = offers(vhost, PROTOCOL_F_REPLY_ACK);
    uint32_t flags = acknowledged ? VERSION | NEED_REPLY : VERSION;
    uint64_t failed = 0;

    send_message(vhost, (struct header){request, flags, size}, payload, fd);
    if (acknowledged)
        receive_reply(vhost, request, &failed, sizeof failed);
    if (failed)
        refuse(vhost, "refuses a message");
}

static void tell_number(struct vhost *vhost, uint32_t request, uint64_t number, int fd)
{
    tell(vhost, request, &number, sizeof number, fd);
}

static void tell_state(struct vhost *vhost, uint32_t request, uint32_t index, uint32_t value)
{
    struct vring_state state = {index, value};
    tell(vhost, request, &state, sizeof state, -1);
}

static void negotiate(struct vhost *vhost)
{
    uint64_t wanted = F_VERSION_1 | F_PROTOCOL_FEATURES | F_MQ | F_WRITE_ZEROES;
    uint64_t known =
        PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG | PROTOCOL_F_INFLIGHT_SHMFD;

    if (!vhost->config.plain)
        wanted |= F_EVENT_IDX | F_INDIRECT;
    vhost->protocol_features = 0; /* nothing may be acknowledged before that is agreed on */
    tell(vhost, SET_OWNER, NULL, 0, -1);
    vhost->features = ask_number(vhost, GET_FEATURES) & wanted;
    if (!(vhost->features & F_VERSION_1) || !(vhost->features & F_PROTOCOL_FEATURES))
        refuse(vhost, "offers neither virtio 1 nor protocol features");
    known &= ask_number(vhost, GET_PROTOCOL_FEATURES);
    tell_number(vhost, SET_PROTOCOL_FEATURES, known, -1);
    vhost->protocol_features = known;
    tell_number(vhost, SET_FEATURES, vhost->features, -1);
}

static void read_config(struct vhost *vhost)
{
    struct config config = {.size = sizeof config.space};

    if (!offers(vhost, PROTOCOL_F_CONFIG))
        refuse(vhost, "offers no configuration");
    if (offers(vhost, PROTOCOL_F_MQ) && ask_number(vhost, GET_QUEUE_NUM) < vhost->config.queues)
        refuse(vhost, "has fewer queues");
    ask(vhost, GET_CONFIG, &config, sizeof config, sizeof config);
    vhost->door.size = config.space.capacity * 512;
}

static void share_memory(struct vhost *vhost)
{
    const struct memory *memory = vhost->config.memory;
    struct memory_table table = {.n_regions = 1,
                                 .guest_address = GUEST_BASE,
                                 .size = memory->size,
                                 .user_address = (uintptr_t)memory->base};
    tell(vhost, SET_MEM_TABLE, &table, sizeof table, memory->fd);
}

/* 'Inflight I/O tracking': the server's notes on what it has begun are kept for its successor. */
static void share_inflight(struct vhost *vhost)
{
    struct inflight *inflight = &vhost->inflight;

    if (!offers(vhost, PROTOCOL_F_INFLIGHT_SHMFD))
        return;
    if (vhost->inflight_fd < 0) {
        *inflight = (struct inflight){.num_queues = vhost->config.queues,
                                      .queue_size = vhost->rings[0].size};
        vhost->inflight_fd =
            ask(vhost, GET_INFLIGHT_FD, inflight, sizeof *inflight, sizeof *inflight);
        if (vhost->inflight_fd < 0)
            refuse(vhost, "sends no descriptor of its notes");
    }
    tell(vhost, SET_INFLIGHT_FD, inflight, sizeof *inflight, vhost->inflight_fd);
}

/* A server that comes back goes on where the used ring ends, as QEMU tells it. */
static void start_ring(struct vhost *vhost, uint32_t index)
{
    struct ring *ring = &vhost->rings[index];
    struct vring_address address = {.index = index,
                                    .descriptors = (uintptr_t)ring->descriptors,
                                    .used = (uintptr_t)ring->used,
                                    .available = (uintptr_t)ring->available};

    ring->event_idx = vhost->features & F_EVENT_IDX;
    ring->indirect = vhost->features & F_INDIRECT;
    tell_state(vhost, SET_VRING_NUM, index, ring->size);
    tell_state(vhost, SET_VRING_BASE, index, ring->used->idx);
    tell(vhost, SET_VRING_ADDR, &address, sizeof address, -1);
    tell_number(vhost, SET_VRING_KICK, index, ring->kick);
    tell_number(vhost, SET_VRING_CALL, index, ring->call);
    tell_state(vhost, SET_VRING_ENABLE, index, 1);
}

static void watch(struct vhost *vhost, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.fd = fd};
    if (epoll_ctl(vhost->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll", strerror(errno));
}

static bool attach(struct vhost *vhost)
{
    vhost->broken = false;
    negotiate(vhost);
    read_config(vhost);
    share_memory(vhost);
    share_inflight(vhost);
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        start_ring(vhost, index);
    watch(vhost, vhost->socket, EPOLLIN | EPOLLRDHUP);
    return !vhost->broken;
}

static bool resume(struct door *door)
{
    struct vhost *vhost = (struct vhost *)door;

    if (vhost->inflight_fd < 0)
        die(vhost->config.path, "has gone, and keeps no notes of what was in flight");
    if (vhost->socket >= 0)
        close(vhost->socket);
    vhost->socket = connect_to(vhost->config.path);
    if (vhost->socket < 0 || !attach(vhost))
        return false;
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        ring_push(&vhost->rings[index], true);
    return true;
}

static void submit(struct door *door, struct request *request)
{
    struct vhost *vhost = (struct vhost *)door;
    unsigned queues = vhost->config.queues;
    ring_add(&vhost->rings[request->number % queues], request->number / queues, request);
}

static void push(struct door *door)
{
    struct vhost *vhost = (struct vhost *)door;
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        ring_push(&vhost->rings[index], false);
}

static unsigned reap_all(struct vhost *vhost, struct request **finished)
{
    unsigned n = 0;
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        n += ring_reap(&vhost->rings[index], finished + n);
    return n;
}

static bool arm_all(struct vhost *vhost)
{
    bool nothing = true;
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        nothing &= ring_arm(&vhost->rings[index]);
    return nothing;
}

/* Sleep until a ring's interrupt, or without end where `timeout` is -1. The eventfds are
 * edge-triggered: nobody has to read them. False: the server has gone. */
static bool wait_for_events(struct vhost *vhost, int timeout)
{
    struct epoll_event events[MAX_QUEUES + 1];
    int n = epoll_wait(vhost->epoll, events, MAX_QUEUES + 1, timeout);

    for (int i = 0; i < n; i++)
        if (events[i].data.fd == vhost->socket)
            return false;
    return true;
}

static unsigned reap_sleeping(struct door *door, struct request **finished)
{
    struct vhost *vhost = (struct vhost *)door;
    unsigned n = reap_all(vhost, finished);
    bool alive = true;

    while (n == 0 && alive) {
        if (arm_all(vhost))
            alive = wait_for_events(vhost, -1);
        n = reap_all(vhost, finished);
    }
    return n;
}

static void pause_briefly(void)
{
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
}

static unsigned reap_spinning(struct door *door, struct request **finished)
{
    enum { SPINS = 1 << 16 }; /* between two looks at the socket */
    struct vhost *vhost = (struct vhost *)door;
    unsigned n = 0, spins = 0;
    bool alive = true;

    while (n == 0 && alive) {
        pause_briefly();
        if (++spins % SPINS == 0)
            alive = wait_for_events(vhost, 0);
        n = reap_all(vhost, finished);
    }
    for (uint32_t index = 0; index < vhost->config.queues; index++)
        ring_disarm(&vhost->rings[index]);
    return n;
}

struct door *vhost_door(const struct door_config *config)
{
    struct vhost *vhost = allocate(sizeof *vhost);

    vhost->config = *config;
    vhost->door = (struct door){.submit = submit,
                                .push = push,
                                .reap = config->spin ? reap_spinning : reap_sleeping,
                                .resume = resume};
    vhost->inflight_fd = -1;
    vhost->epoll = epoll_create1(EPOLL_CLOEXEC);
    vhost->socket = connect_to(config->path);
    if (vhost->socket < 0 || vhost->epoll < 0)
        die(config->path, strerror(errno));
    for (uint32_t index = 0; index < config->queues; index++) {
        ring_open(&vhost->rings[index], config->memory, (config->depth - 1) / config->queues + 1);
        watch(vhost, vhost->rings[index].call, EPOLLIN | EPOLLET);
        if (config->spin)
            ring_disarm(&vhost->rings[index]);
    }
    if (!attach(vhost))
        die(config->path, "hangs up");
    return &vhost->door;
}
