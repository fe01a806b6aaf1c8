/* SPDX-License-Identifier: BSD-3-Clause */
/* The guest's memory as its front end shares it. The table changes only while no queue runs. */
#pragma once

#include <sys/uio.h>

#include "protocol.h"

/* Bytes of one guest. Files may be sparse: without a bound a few would take the whole address
 * space, which all guests of this process share. */
#define MEMORY_MAX (UINT64_C(1) << 40)

/* Part of a file of the front end's. */
struct region {
    struct vhost_region where;
    void *mapped; /* of mapped_bytes; the region begins at `base` in it */
    uint64_t mapped_bytes;
    uint8_t *base; /* NULL: not mapped */
};

/* Map where->bytes from where->offset of a file on; *lost becomes true if it is truncated later.
 * Returns 0 or an errno. */
int memory_map(struct region *region, const struct vhost_region *where, int fd, _Atomic bool *lost);
void memory_unmap(struct region *region);

struct memory {
    struct region regions[VHOST_MAX_REGIONS];
    unsigned n;
    _Atomic bool lost; /* its file was truncated: what is read of it is zeros now */
};

/* Replace the table by the one in the message, of which the descriptors stay the message's. Returns
 * 0 or an errno; then there is no memory. */
int memory_set(struct memory *memory, const struct vhost_message *message);
void memory_clear(struct memory *memory);

/* Where an address of the front end's lies, such as a ring of so many bytes; NULL: nowhere, or not
 * aligned. */
void *memory_of_user(const struct memory *memory, uint64_t address, uint64_t bytes, unsigned align);
/* Where `bytes` at a guest's address lie, in at most `most` parts, which is more than one where
 * regions are neighbours. Returns how many, or 0: not all of it is memory. */
unsigned memory_of_guest(const struct memory *memory, uint64_t address, uint32_t bytes,
                         struct iovec *parts, unsigned most);
