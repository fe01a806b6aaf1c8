/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "block.h"
#include "inflight.h"
#include "queue.h"

/* One front end. Its settings are changed by the thread that reads its messages, and only while the
 * queues that they concern stand still. */
struct session {
    const struct vhost_config *config;
    int socket;
    uint64_t features;       /* as agreed */
    _Atomic bool write_back; /* what is written need not be durable before FLUSH */
    struct memory memory;
    struct inflight inflight;
    struct queue queues[VIRTQUEUES];
    int backend_requests; /* a socket for what we would ask of the front end; we never do */
    char *error;
    size_t error_size;
};

/* BACKEND_REQ because Linux's virtio_uml has no interrupts without it: it allocates their number
 * with that socket's (vhost_user_init_slave_req). */
static const uint64_t PROTOCOL_FEATURES = VHOST_PROTOCOL_MQ | VHOST_PROTOCOL_REPLY_ACK |
                                          VHOST_PROTOCOL_BACKEND_REQ | VHOST_PROTOCOL_CONFIG |
                                          VHOST_PROTOCOL_INFLIGHT | VHOST_PROTOCOL_RESET;

static int fail(struct session *session, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static int fail(struct session *session, int error, const char *format, ...)
{
    va_list values;
    va_start(values, format);
    vsnprintf(session->error, session->error_size, format, values);
    va_end(values);
    return error;
}

static uint64_t offered(const struct session *session)
{
    return block_features(session->config) | VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT |
           VIRTIO_F_EVENT_IDX | VHOST_F_PROTOCOL_FEATURES;
}

/* virtio 5.2.6.2: without FLUSH a guest has no other way to make its writes durable. */
static void update_write_back(struct session *session, bool wanted)
{
    atomic_store(&session->write_back, session->features & VIRTIO_BLK_F_FLUSH && wanted);
}

/* --- Queues --- */

static bool can_run(const struct session *session, const struct queue *queue)
{
    bool is_enabled = queue->is_enabled || !(session->features & VHOST_F_PROTOCOL_FEATURES);
    return is_enabled && queue->kick >= 0 && queue->has_address && queue->ring.size &&
           session->memory.n;
}

/* Where the rings lie now. */
static bool find_rings(struct session *session, struct queue *queue)
{
    struct virtqueue *ring = &queue->ring;
    const struct vhost_vring_address *at = &queue->address;
    const struct memory *memory = &session->memory;
    ring->memory = memory;
    ring->descriptors =
        memory_of_user(memory, at->descriptors, virtqueue_descriptors_bytes(ring->size),
                       VIRTQUEUE_DESCRIPTORS_ALIGN);
    ring->available = memory_of_user(memory, at->available, virtqueue_available_bytes(ring->size),
                                     VIRTQUEUE_AVAILABLE_ALIGN);
    ring->used =
        memory_of_user(memory, at->used, virtqueue_used_bytes(ring->size), VIRTQUEUE_USED_ALIGN);
    return ring->descriptors && ring->available && ring->used;
}

static int start_if_ready(struct session *session, struct queue *queue)
{
    unsigned index = (unsigned)(queue - session->queues);
    if (queue_is_running(queue) || !can_run(session, queue))
        return 0;
    queue->ring.has_indirect = session->features & VIRTIO_F_INDIRECT;
    queue->ring.has_event_index = session->features & VIRTIO_F_EVENT_IDX;
    if (!find_rings(session, queue))
        return fail(session, EINVAL, "queue %u lies outside of the shared memory", index);
    if (!inflight_find(&session->inflight, index, queue->ring.size, &queue->ring.inflight))
        return fail(session, EINVAL, "the inflight area has no place for queue %u", index);
    int error = queue_start(queue, session->config, &session->write_back, session->socket);
    return error ? fail(session, error, "queue %u: %s", index, strerror(error)) : 0;
}

static int start_all(struct session *session)
{
    int error = 0;
    for (unsigned i = 0; i < VIRTQUEUES && !error; i++)
        error = start_if_ready(session, &session->queues[i]);
    return error;
}

static void stop_all(struct session *session)
{
    for (unsigned i = 0; i < VIRTQUEUES; i++)
        queue_stop(&session->queues[i]);
}

static void reset(struct session *session)
{
    stop_all(session);
    for (unsigned i = 0; i < VIRTQUEUES; i++) {
        session->queues[i].is_enabled = session->queues[i].has_address = false;
        queue_set_fd(&session->queues[i], &session->queues[i].kick, -1);
    }
    update_write_back(session, true);
}

/* The queue that a message is about; NULL: there is none. */
static struct queue *queue_of(struct session *session, uint64_t index)
{
    if (index < VIRTQUEUES)
        return &session->queues[index];
    fail(session, EINVAL, "there is no queue %llu", (unsigned long long)index);
    return NULL;
}

static int set_vring_num(struct session *session, struct queue *queue, uint32_t num)
{
    if (!num || num > VIRTQUEUE_MAX || num & (num - 1))
        return fail(session, EINVAL, "a queue of %u descriptors is not possible", num);
    queue->ring.size = (uint16_t)num;
    return 0;
}

/* Settings of a queue that stands still while they change. */
static int set_vring(struct session *session, struct vhost_message *message)
{
    const struct vhost_vring_state *state = &message->payload.state;
    struct queue *queue = queue_of(session, state->index);
    int error = 0;
    if (!queue)
        return EINVAL;
    queue_stop(queue);
    if (message->request == VHOST_SET_VRING_NUM) {
        error = set_vring_num(session, queue, state->num);
    } else if (message->request == VHOST_SET_VRING_BASE) {
        queue->ring.next = (uint16_t)state->num;
    } else if (message->request == VHOST_SET_VRING_ENABLE) {
        queue->is_enabled = state->num;
    } else {
        queue->address = message->payload.address;
        queue->has_address = true;
    }
    return error ? error : start_if_ready(session, queue);
}

static int get_vring_base(struct session *session, struct vhost_message *message)
{
    struct queue *queue = queue_of(session, message->payload.state.index);
    if (!queue)
        return EINVAL;
    queue_finish(queue);
    queue_set_fd(queue, &queue->kick, -1); /* it starts again with a kick */
    message->payload.state.num = queue->ring.next;
    return protocol_reply(session->socket, message, sizeof message->payload.state, -1);
}

/* We never read it, which a pipe or file would not stand. */
static bool is_eventfd(int fd)
{
    char path[32], target[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(path, target, sizeof target - 1);
    target[length < 0 ? 0 : length] = 0;
    return strcmp(target, "anon_inode:[eventfd]") == 0;
}

static int set_kick(struct session *session, struct queue *queue, int fd)
{
    bool is_kick = is_eventfd(fd);
    queue_stop(queue);
    queue_set_fd(queue, &queue->kick, is_kick ? fd : -1);
    if (!is_kick && fd >= 0)
        close(fd);
    return is_kick ? start_if_ready(session, queue)
                   : fail(session, EINVAL, "a queue's kick must be an eventfd");
}

static int set_vring_fd(struct session *session, struct vhost_message *message)
{
    struct queue *queue = queue_of(session, message->payload.u64 & (VHOST_NO_FD - 1));
    if (!queue)
        return EINVAL;
    int fd = message->payload.u64 & VHOST_NO_FD ? -1 : protocol_take_fd(message);
    if (message->request == VHOST_SET_VRING_KICK)
        return set_kick(session, queue, fd);
    bool is_call = message->request == VHOST_SET_VRING_CALL;
    queue_set_fd(queue, is_call ? &queue->call : &queue->failure, fd);
    if (is_call && queue_is_running(queue))
        queue_interrupt(queue); /* what was to be told before it came */
    return 0;
}

/* --- Memory, features, configuration --- */

static int set_memory(struct session *session, const struct vhost_message *message)
{
    stop_all(session);
    int error = memory_set(&session->memory, message);
    if (error)
        return fail(session, error, "the guest's memory cannot be mapped: %s", strerror(error));
    return start_all(session);
}

static int set_features(struct session *session, uint64_t features)
{
    if (features & ~offered(session))
        return fail(session, EINVAL, "features %#llx were not offered",
                    (unsigned long long)(features & ~offered(session)));
    stop_all(session);
    session->features = features;
    update_write_back(session, true);
    return start_all(session);
}

static int get_config(struct session *session, struct vhost_message *message)
{
    struct vhost_device_config *config = &message->payload.config;
    size_t header = offsetof(struct vhost_device_config, bytes);
    if (message->size < header || config->size > VHOST_CONFIG_MAX)
        return fail(session, EINVAL, "a configuration of %u bytes is asked for", config->size);
    block_config(session->config, atomic_load(&session->write_back), config->offset, config->bytes,
                 config->size);
    return protocol_reply(session->socket, message, (uint32_t)header + config->size, -1);
}

static int set_config(struct session *session, const struct vhost_message *message)
{
    const struct vhost_device_config *config = &message->payload.config;
    if (message->size != offsetof(struct vhost_device_config, bytes) + config->size ||
        !(session->features & VIRTIO_BLK_F_CONFIG_WCE) ||
        !block_is_write_back_byte(config->offset, config->size))
        return fail(session, EINVAL, "of the configuration only 'writeback' may be written");
    update_write_back(session, config->bytes[0]);
    return 0;
}

/* --- Inflight area --- */

static int set_inflight(struct session *session, struct vhost_message *message, int fd)
{
    stop_all(session);
    int error = inflight_set(&session->inflight, &message->payload.inflight, fd);
    return error ? fail(session, error, "the inflight area cannot be mapped") : start_all(session);
}

static int get_inflight(struct session *session, struct vhost_message *message)
{
    struct vhost_inflight_area *area = &message->payload.inflight;
    int fd = inflight_make(area);
    if (fd < 0)
        return fail(session, EINVAL, "an inflight area for %u queues of %u is not possible",
                    area->n_queues, area->queue_size);
    int error = set_inflight(session, message, fd);
    if (!error)
        error = protocol_reply(session->socket, message, sizeof *area, fd);
    close(fd);
    return error;
}

/* --- Messages --- */

static int set_backend_requests(struct session *session, int fd)
{
    if (session->backend_requests >= 0)
        close(session->backend_requests);
    session->backend_requests = fd;
    return 0;
}

static int reply_u64(struct session *session, struct vhost_message *message, uint64_t value)
{
    message->payload.u64 = value;
    return protocol_reply(session->socket, message, sizeof value, -1);
}

/* What must come with it, in bytes. */
static uint32_t least_size(uint32_t request)
{
    switch (request) {
    case VHOST_SET_FEATURES:
    case VHOST_SET_PROTOCOL_FEATURES:
    case VHOST_SET_VRING_KICK:
    case VHOST_SET_VRING_CALL:
    case VHOST_SET_VRING_ERR:
    case VHOST_SET_VRING_NUM:
    case VHOST_SET_VRING_BASE:
    case VHOST_GET_VRING_BASE:
    case VHOST_SET_VRING_ENABLE:
        return 8;
    case VHOST_SET_VRING_ADDR:
        return sizeof(struct vhost_vring_address);
    case VHOST_GET_INFLIGHT_FD:
    case VHOST_SET_INFLIGHT_FD:
        return offsetof(struct vhost_inflight_area, queue_size) + sizeof(uint16_t);
    default:
        return 0;
    }
}

/* Whether an answer of its own belongs to a request. */
static bool has_reply(uint32_t request)
{
    return request == VHOST_GET_FEATURES || request == VHOST_GET_PROTOCOL_FEATURES ||
           request == VHOST_GET_QUEUE_NUM || request == VHOST_GET_CONFIG ||
           request == VHOST_GET_VRING_BASE || request == VHOST_GET_INFLIGHT_FD;
}

static int handle(struct session *session, struct vhost_message *message)
{
    if (message->size < least_size(message->request))
        return fail(session, EPROTO, "message %u of %u bytes is too short", message->request,
                    message->size);
    switch (message->request) {
    case VHOST_GET_FEATURES:
        return reply_u64(session, message, offered(session));
    case VHOST_SET_FEATURES:
        return set_features(session, message->payload.u64);
    case VHOST_GET_PROTOCOL_FEATURES:
        return reply_u64(session, message, PROTOCOL_FEATURES);
    case VHOST_SET_PROTOCOL_FEATURES:
        return 0;
    case VHOST_GET_QUEUE_NUM:
        return reply_u64(session, message, VIRTQUEUES);
    case VHOST_SET_OWNER:
        return 0;
    case VHOST_RESET_OWNER:
    case VHOST_RESET_DEVICE:
        reset(session);
        return 0;
    case VHOST_SET_MEM_TABLE:
        return set_memory(session, message);
    case VHOST_SET_VRING_NUM:
    case VHOST_SET_VRING_BASE:
    case VHOST_SET_VRING_ADDR:
    case VHOST_SET_VRING_ENABLE:
        return set_vring(session, message);
    case VHOST_GET_VRING_BASE:
        return get_vring_base(session, message);
    case VHOST_SET_VRING_KICK:
    case VHOST_SET_VRING_CALL:
    case VHOST_SET_VRING_ERR:
        return set_vring_fd(session, message);
    case VHOST_SET_BACKEND_REQ_FD:
        return set_backend_requests(session, protocol_take_fd(message));
    case VHOST_GET_CONFIG:
        return get_config(session, message);
    case VHOST_SET_CONFIG:
        return set_config(session, message);
    case VHOST_GET_INFLIGHT_FD:
        return get_inflight(session, message);
    case VHOST_SET_INFLIGHT_FD:
        return set_inflight(session, message, message->fds[0]);
    default:
        return fail(session, EPROTO, "message %u is not known", message->request);
    }
}

/* A setting that fails does not end the connection where the front end asks whether it did. It may
 * ask without having agreed on REPLY_ACK here: QEMU 7.2 does not negotiate anew when its server was
 * restarted while the guest was stopped. */
static int acknowledge(struct session *session, struct vhost_message *message, int error)
{
    if (!(message->flags & VHOST_NEED_REPLY) || has_reply(message->request))
        return error;
    return reply_u64(session, message, error != 0);
}

static int next_message(struct session *session)
{
    struct vhost_message message;
    int error = protocol_receive(session->socket, &message);
    if (error > 0)
        fail(session, error, "%s", strerror(error));
    if (!error)
        error = acknowledge(session, &message, handle(session, &message));
    protocol_release(&message);
    return error;
}

static bool is_any_broken(const struct session *session)
{
    for (unsigned i = 0; i < VIRTQUEUES; i++)
        if (atomic_load(&session->queues[i].broken))
            return true;
    return false;
}

static void close_all(struct session *session)
{
    stop_all(session);
    for (unsigned i = 0; i < VIRTQUEUES; i++)
        queue_destroy(&session->queues[i]);
    set_backend_requests(session, -1);
    inflight_clear(&session->inflight);
    memory_clear(&session->memory);
}

int vhost_serve(const struct vhost_config *config, int socket, char *error, size_t error_size)
{
    struct session *session = calloc(1, sizeof *session);
    *error = 0;
    if (!session)
        return ENOMEM;
    session->config = config;
    session->socket = socket;
    session->backend_requests = -1;
    session->error = error;
    session->error_size = error_size;
    for (unsigned i = 0; i < VIRTQUEUES; i++)
        queue_init(&session->queues[i]);
    atomic_fetch_add(&tm_doors(config->device)->vhost, 1);
    int failed = 0;
    while (!failed)
        failed = next_message(session);
    if (is_any_broken(session))
        failed = fail(session, EPROTO, "its queue or its memory is damaged");
    close_all(session);
    atomic_fetch_sub(&tm_doors(config->device)->vhost, 1);
    free(session);
    return failed < 0 ? 0 : failed;
}
