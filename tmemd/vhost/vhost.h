/* SPDX-License-Identifier: BSD-3-Clause */
/* The virtio door: serves a device to a vhost-user-blk front end (QEMU, cloud-hypervisor, crosvm,
 * UML) through virtqueues in memory shared with the guest. Of the core it knows tmem.h alone.
 *
 * Sources: QEMU's docs/interop/vhost-user.rst ('vhost-user'), and Virtual I/O Device (VIRTIO)
 * Version 1.2 ('virtio'), whose sections are named where a rule comes from one.
 *
 * Neither the guest nor its front end is trusted: what they share is copied before it is looked at,
 * every number is checked, and whoever breaks a rule loses his connection, nothing else. One thing
 * a front end can do: fill the descriptor that it is to be interrupted by, and make it block. Then
 * its own connection does not end, nor does an orderly stop of the server; SIGKILL, which is how
 * servers are stopped, ends it. */
#pragma once

#include "tmem.h"

struct vhost_config {
    struct tm_device *device;
    const char *serial;   /* what the guest is told the disk is called; 20 characters count */
    uint64_t size;        /* bytes; a multiple of 512 */
    uint32_t block_bytes; /* the guest's logical block: 512 or 4096 */
    bool read_only;
    uint32_t poll_us; /* how long a queue may be watched before its thread goes to sleep */
};

/* Serve whoever is at the other end of a connected stream socket until he leaves. Returns 0, or an
 * errno and in *error (of error_size bytes) what was wrong. The socket stays the caller's; shut
 * down, it ends the call. The process ignores SIGPIPE, as nbdkit does. */
int vhost_serve(const struct vhost_config *config, int socket, char *error, size_t error_size);
