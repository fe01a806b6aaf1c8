/* SPDX-License-Identifier: BSD-3-Clause */
/* The store that is a local file or block device. */
#pragma once

#include <stdatomic.h>
#include <sys/stat.h>

#include "store.h"

struct local {
    struct store store;
    int fd;
    bool drop_cache; /* what is read and written leaves the page cache again */
    bool immutable;  /* it is what it was when it was opened, or cannot be read: ESTALE */
    struct stat opened;
    int notices;                /* of writes to it, by inotify; -1: there are none to be had */
    _Atomic uint64_t undropped; /* bytes written since the page cache was last dropped */
};

/* The descriptor stays the caller's. 0 or an errno. */
int local_init(struct local *local, int fd, bool drop_cache, bool immutable);
void local_destroy(struct local *local);
