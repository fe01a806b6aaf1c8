/* SPDX-License-Identifier: BSD-3-Clause */
/* A small NBD client: fixed newstyle handshake, simple replies, requests pipelined; written from
 * the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md). It is to cost as little as the vhost
 * door does: what is submitted together is sent by one call, and answers are received together. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "door.h"

/* 'Values' */
#define NBD_MAGIC UINT64_C(0x4e42444d41474943)
#define OPTION_MAGIC UINT64_C(0x49484156454f5054)
#define OPTION_REPLY_MAGIC UINT64_C(0x3e889045565a9)
#define REQUEST_MAGIC 0x25609513
#define SIMPLE_REPLY_MAGIC 0x67446698
enum { FIXED_NEWSTYLE = 1 << 0, NO_ZEROES = 1 << 1 }; /* of either side's handshake flags */
enum { OPT_GO = 7 };
enum { REP_ACK = 1, REP_INFO = 3, INFO_EXPORT = 0 };
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_WRITE_ZEROES = 6 };

struct greeting {
    uint64_t magic, option_magic;
    uint16_t flags;
} __attribute__((packed));

struct option {
    uint32_t client_flags; /* not the option's, but they precede the first one */
    uint64_t magic;
    uint32_t option, length, name_length;
} __attribute__((packed));

struct option_reply {
    uint64_t magic;
    uint32_t option, type, length;
} __attribute__((packed));

struct command {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

struct reply {
    uint32_t magic, error;
    uint64_t cookie;
} __attribute__((packed));

enum { ROOM = 2 << 20 }; /* for what was received and is not looked at yet */

struct nbd {
    struct door door;
    struct door_config config;
    int socket;
    struct command commands[MAX_DEPTH];
    struct iovec out[2 * MAX_DEPTH]; /* what waits to be sent */
    unsigned n_out;
    uint8_t *in; /* what was received lies from in_start to in_end */
    size_t in_start, in_end;
};

static bool send_all(int socket, const void *data, size_t size)
{
    return send(socket, data, size, MSG_NOSIGNAL) == (ssize_t)size;
}

static bool receive_all(int socket, void *data, size_t size)
{
    return size == 0 || recv(socket, data, size, MSG_WAITALL) == (ssize_t)size;
}

/* 'NBD_OPT_GO', with no information asked for but what is always sent */
static bool ask_to_go(struct nbd *nbd)
{
    const char *name = nbd->config.export;
    uint32_t length = strlen(name);
    uint16_t no_requests = 0;
    struct option go = {.client_flags = htobe32(FIXED_NEWSTYLE | NO_ZEROES),
                        .magic = htobe64(OPTION_MAGIC),
                        .option = htobe32(OPT_GO),
                        .length = htobe32(sizeof go.name_length + length + sizeof no_requests),
                        .name_length = htobe32(length)};

    return send_all(nbd->socket, &go, sizeof go) && send_all(nbd->socket, name, length) &&
           send_all(nbd->socket, &no_requests, sizeof no_requests);
}

/* One answer of several; *type is what it was. */
static bool take_option_reply(struct nbd *nbd, uint32_t *type)
{
    struct option_reply reply;
    uint8_t data[512];
    uint16_t info;

    if (!receive_all(nbd->socket, &reply, sizeof reply))
        return false;
    uint32_t length = be32toh(reply.length);
    *type = be32toh(reply.type);
    if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || length > sizeof data)
        die(nbd->config.path, "does not speak NBD");
    if (*type != REP_ACK && *type != REP_INFO)
        die(nbd->config.path, "has no such export");
    if (!receive_all(nbd->socket, data, length))
        return false;
    memcpy(&info, data, sizeof info);
    if (*type == REP_INFO && be16toh(info) == INFO_EXPORT) {
        memcpy(&nbd->door.size, data + sizeof info, sizeof nbd->door.size);
        nbd->door.size = be64toh(nbd->door.size);
    }
    return true;
}

static bool attach(struct nbd *nbd)
{
    struct greeting greeting;
    uint32_t type = REP_INFO;

    nbd->socket = connect_to(nbd->config.path);
    if (nbd->socket < 0 || !receive_all(nbd->socket, &greeting, sizeof greeting))
        return false;
    if (be64toh(greeting.magic) != NBD_MAGIC || be64toh(greeting.option_magic) != OPTION_MAGIC)
        die(nbd->config.path, "does not speak NBD");
    if (!ask_to_go(nbd))
        return false;
    while (type != REP_ACK)
        if (!take_option_reply(nbd, &type))
            return false;
    return true;
}

static void submit(struct door *door, struct request *request)
{
    static const uint16_t types[] = {CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES};
    struct nbd *nbd = (struct nbd *)door;
    struct command *command = &nbd->commands[request->number];

    *command = (struct command){.magic = htobe32(REQUEST_MAGIC),
                                .type = htobe16(types[request->operation]),
                                .cookie = request->number,
                                .offset = htobe64(request->offset),
                                .length = htobe32(request->length)};
    nbd->out[nbd->n_out++] = (struct iovec){command, sizeof *command};
    if (request->operation == OP_WRITE)
        nbd->out[nbd->n_out++] = (struct iovec){request->data, request->length};
}

static void note_sent(struct nbd *nbd, size_t sent)
{
    struct iovec *part = nbd->out;

    while (sent > 0 && sent >= part->iov_len)
        sent -= part++->iov_len;
    nbd->n_out -= part - nbd->out;
    memmove(nbd->out, part, nbd->n_out * sizeof *part);
    if (sent > 0) {
        nbd->out[0].iov_base = (uint8_t *)nbd->out[0].iov_base + sent;
        nbd->out[0].iov_len -= sent;
    }
}

/* Send as much as the socket takes now; reap goes on with the rest, for a server that waits until
 * we have received what was read takes no more. */
static void push(struct door *door)
{
    struct nbd *nbd = (struct nbd *)door;
    struct msghdr message = {.msg_iov = nbd->out, .msg_iovlen = nbd->n_out};

    if (nbd->n_out == 0)
        return;
    ssize_t sent = sendmsg(nbd->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent > 0)
        note_sent(nbd, sent);
}

/* The next answer that is there as a whole, or NULL. */
static struct request *take_reply(struct nbd *nbd)
{
    const uint8_t *at = nbd->in + nbd->in_start;
    size_t there = nbd->in_end - nbd->in_start;
    struct reply reply;

    if (there < sizeof reply)
        return NULL;
    memcpy(&reply, at, sizeof reply);
    if (be32toh(reply.magic) != SIMPLE_REPLY_MAGIC || reply.cookie >= nbd->config.depth)
        die(nbd->config.path, "an answer to nothing");
    struct request *request = &nbd->config.requests[reply.cookie];
    request->failed = reply.error != 0;
    size_t data = request->operation == OP_READ && !request->failed ? request->length : 0;
    if (there < sizeof reply + data)
        return NULL;
    memcpy(request->data, at + sizeof reply, data);
    nbd->in_start += sizeof reply + data;
    return request;
}

/* False: the server has gone. */
static bool receive(struct nbd *nbd)
{
    memmove(nbd->in, nbd->in + nbd->in_start, nbd->in_end - nbd->in_start);
    nbd->in_end -= nbd->in_start;
    nbd->in_start = 0;
    int flags = nbd->config.spin || nbd->n_out ? MSG_DONTWAIT : 0;
    ssize_t n = recv(nbd->socket, nbd->in + nbd->in_end, ROOM - nbd->in_end, flags);
    if (n > 0)
        nbd->in_end += n;
    return n > 0 || (n < 0 && errno == EAGAIN);
}

static unsigned reap(struct door *door, struct request **finished)
{
    struct nbd *nbd = (struct nbd *)door;
    unsigned n = 0;
    bool alive = true;

    while (n == 0 && alive) {
        if (nbd->n_out) {
            struct pollfd events = {.fd = nbd->socket, .events = POLLIN | POLLOUT};
            poll(&events, 1, -1);
            push(door);
        }
        alive = receive(nbd);
        for (struct request *request; (request = take_reply(nbd));)
            finished[n++] = request;
    }
    return n;
}

/* What was in flight may have been carried out or not: to do it again is right in either case. */
static bool resume(struct door *door)
{
    struct nbd *nbd = (struct nbd *)door;

    if (nbd->socket >= 0)
        close(nbd->socket);
    nbd->n_out = 0;
    nbd->in_start = nbd->in_end = 0;
    if (!attach(nbd))
        return false;
    for (unsigned i = 0; i < nbd->config.depth; i++)
        if (nbd->config.requests[i].in_flight)
            submit(door, &nbd->config.requests[i]);
    push(door);
    return true;
}

struct door *nbd_door(const struct door_config *config)
{
    struct nbd *nbd = allocate(sizeof *nbd);

    nbd->config = *config;
    nbd->door = (struct door){.submit = submit, .push = push, .reap = reap, .resume = resume};
    nbd->in = allocate(ROOM);
    if (!attach(nbd))
        die(config->path, errno ? strerror(errno) : "hangs up");
    return &nbd->door;
}
