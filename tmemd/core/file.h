/* SPDX-License-Identifier: BSD-3-Clause */
/* The backing file: page n at n x 4096. Runs of neighbours bypass the page cache. */
#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "bounce.h"
#include "tmem.h"

struct file {
    int fd; /* -1: none */
    uint64_t bytes;
    bool direct;
    bool immutable; /* it is what it was when it was opened, or cannot be read */
    struct stat opened;
    int notices;                   /* of writes to it, by inotify; -1: there are none to be had */
    _Atomic uint64_t *sync_failed; /* not 0: an fdatasync failed, and what it covered may be lost,
                                      whatever later ones say */
    _Atomic uint64_t undropped;    /* bytes written since the page cache was last dropped */
    pthread_mutex_t lock;          /* guards what follows; not held over an fdatasync */
    pthread_cond_t synced;
    uint64_t syncs_begun,
        syncs_done; /* numbers of fdatasyncs; where they differ one is under way */
};

/* sync_failed is the caller's, in the pool: it outlives the process. */
int file_init(struct file *file, const struct tm_config *config, _Atomic uint64_t *sync_failed);
void file_destroy(struct file *file);

/* Whole pages to or from an aligned buffer: 0 or an errno; ESTALE: an immutable file has changed.
 * Beyond the file's end zeros are read. */
int file_read(struct file *file, uint64_t page, uint32_t n, uint8_t *buffer);
int file_write(struct file *file, uint64_t page, uint32_t n, const uint8_t *buffer);
/* Zero n pages. Where the file system can, their blocks stay reserved, or (punch) are given back.
 */
int file_zero(struct file *file, uint64_t page, uint64_t n, bool punch);
/* Make what was written before the call durable, by one fdatasync for all who ask meanwhile. Once
 * one has failed this fails for ever, for the kernel forgets what it could not write (PostgreSQL's
 * data_sync_retry): 0 or EIO. */
int file_sync(struct file *file);
/* Whether one has failed. */
static inline bool file_is_doubtful(const struct file *file)
{
    return file->fd >= 0 && atomic_load(file->sync_failed);
}
