/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "protocol.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long the rest of a message may take, in ms. Front ends send it in one piece. */
enum { PATIENCE = 5000 };

struct header {
    uint32_t request, flags, size;
};

static void keep_fds(struct vhost_message *message, struct msghdr *received)
{
    for (struct cmsghdr *each = CMSG_FIRSTHDR(received); each; each = CMSG_NXTHDR(received, each)) {
        if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
            continue;
        size_t n = (each->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(each) + i * sizeof fd, sizeof fd);
            if (message->n_fds < VHOST_MAX_FDS)
                message->fds[message->n_fds++] = fd;
            else
                close(fd);
        }
    }
}

/* Receive exactly so many bytes, and whatever descriptors come along. */
static int receive(int socket, void *to, size_t length, struct vhost_message *message, int patience)
{
    for (size_t got = 0; got < length;) {
        union {
            char bytes[CMSG_SPACE(VHOST_MAX_FDS * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec iov = {(char *)to + got, length - got};
        struct msghdr header = {.msg_iov = &iov,
                                .msg_iovlen = 1,
                                .msg_control = control.bytes,
                                .msg_controllen = sizeof control.bytes};
        struct pollfd ready = {.fd = socket, .events = POLLIN};
        int n = poll(&ready, 1, patience);
        if (n == 0)
            return ETIMEDOUT;
        ssize_t more = n < 0 ? -1 : recvmsg(socket, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
        if (more < 0 && errno != EINTR && errno != EAGAIN)
            return errno;
        if (more == 0)
            return got ? EPROTO : -1;
        if (more > 0) {
            keep_fds(message, &header);
            got += (size_t)more;
            patience = PATIENCE;
        }
    }
    return 0;
}

int protocol_receive(int socket, struct vhost_message *message)
{
    struct header header;
    memset(message, 0, sizeof *message);
    memset(message->fds, -1, sizeof message->fds);
    int error = receive(socket, &header, sizeof header, message, -1);
    if (error)
        return error;
    message->request = header.request;
    message->flags = header.flags;
    message->size = header.size;
    if ((header.flags & VHOST_VERSION_MASK) != VHOST_VERSION || header.flags & VHOST_REPLY ||
        header.size > sizeof message->payload)
        return EPROTO;
    error = receive(socket, &message->payload, header.size, message, PATIENCE);
    return error < 0 ? EPROTO : error;
}

int protocol_reply(int socket, struct vhost_message *message, uint32_t size, int fd)
{
    struct header header = {message->request, VHOST_VERSION | VHOST_REPLY, size};
    struct iovec iov[] = {{&header, sizeof header}, {&message->payload, size}};
    union {
        char bytes[CMSG_SPACE(sizeof fd)];
        struct cmsghdr align;
    } control = {{0}};
    struct msghdr sent = {.msg_iov = iov, .msg_iovlen = 2};
    if (fd >= 0) {
        sent.msg_control = control.bytes;
        sent.msg_controllen = sizeof control.bytes;
        control.align = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.align), &fd, sizeof fd);
    }
    /* A few hundred bytes: who does not take them in at once is not listening. */
    ssize_t done = sendmsg(socket, &sent, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (done < 0)
        return errno;
    return (size_t)done == sizeof header + size ? 0 : EPROTO;
}

int protocol_take_fd(struct vhost_message *message)
{
    int fd = message->fds[0];
    message->fds[0] = -1;
    return fd;
}

void protocol_release(struct vhost_message *message)
{
    for (unsigned i = 0; i < message->n_fds; i++)
        if (message->fds[i] >= 0)
            close(message->fds[i]);
    message->n_fds = 0;
}
