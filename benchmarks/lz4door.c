/* SPDX-License-Identifier: BSD-3-Clause */
/* Our virtio door with nothing behind it but LZ4: each page that is written is compressed, as a put
 * begins, and forgotten; reads are of zeros. What the store costs is what our device loses against
 * it. It links with the door's own sources and has what they call of tmem.h.
 *
 * Usage: lz4door SOCKET BYTES. Serves one front end after the other until it is killed. */
#define _GNU_SOURCE
#include <errno.h>
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vhost.h"

enum { POLL_US = 50 }; /* as `poll=` has it by default (tmemd/device/config.py) */

struct tm_device {
    struct tm_doors doors;
};

int tm_read(struct tm_device *device, void *buffer, uint32_t count, uint64_t offset)
{
    (void)device, (void)offset;
    memset(buffer, 0, count);
    return 0;
}

int tm_write(struct tm_device *device, const void *buffer, uint32_t count, uint64_t offset,
             bool fua)
{
    char room[LZ4_COMPRESSBOUND(TM_PAGE)];
    const char *pages = buffer;

    (void)device, (void)offset, (void)fua;
    for (uint32_t at = 0; at + TM_PAGE <= count; at += TM_PAGE)
        if (LZ4_compress_default(pages + at, room, TM_PAGE, sizeof room) <= 0)
            return EIO;
    return 0;
}

int tm_zero(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    (void)device, (void)count, (void)offset, (void)fua;
    return 0;
}

int tm_trim(struct tm_device *device, uint64_t count, uint64_t offset, bool fua)
{
    return tm_zero(device, count, offset, fua);
}

int tm_flush(struct tm_device *device)
{
    (void)device;
    return 0;
}

bool tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset)
{
    (void)device, (void)op, (void)count, (void)offset;
    return false;
}

struct tm_doors *tm_doors(struct tm_device *device) { return &device->doors; }

int tm_watch_mapping(void *base, uint64_t bytes, _Atomic bool *lost)
{
    (void)base, (void)bytes, (void)lost;
    return 0;
}

void tm_forget_mapping(void *base) { (void)base; }

static int listen_at(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    strncpy(address.sun_path, path, sizeof address.sun_path - 1);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0) {
        perror(path);
        exit(1);
    }
    return fd;
}

int main(int argc, char **argv)
{
    static struct tm_device device;
    char error[256];

    if (argc != 3) {
        fputs("usage: lz4door SOCKET BYTES\n", stderr);
        return 2;
    }
    struct vhost_config config = {.device = &device,
                                  .serial = "lz4",
                                  .size = strtoull(argv[2], NULL, 10),
                                  .block_bytes = TM_PAGE,
                                  .poll_us = POLL_US};
    int listener = listen_at(argv[1]);
    for (;;) {
        int client = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (client < 0 || vhost_serve(&config, client, error, sizeof error))
            fprintf(stderr, "lz4door: %s\n", client < 0 ? strerror(errno) : error);
        close(client);
    }
}
