/* The backing file: page n at n x 4096, read and written in runs of neighbouring pages that bypass the page cache. */
#ifndef TM_FILE_H
#define TM_FILE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "layout.h"

/* Pages of the longest run that is one read or write. */
enum { TM_RUN_MAX = 64 };

/* An aligned buffer for one run. */
struct tm_bounce {
    struct tm_bounce *next;
    uint8_t *pages;
};

struct tm_file {
    int fd; /* -1: none */
    uint64_t bytes;
    bool direct;
    _Atomic uint64_t *sync_failed;  /* not 0: an fdatasync failed, and what it covered may be lost, whatever later ones say */
    _Atomic uint64_t undropped;     /* bytes written since the page cache was last dropped */
    pthread_mutex_t lock;           /* guards the list of spare buffers, and what follows */
    struct tm_bounce *spare;
    pthread_cond_t synced;
    uint64_t syncs_begun, syncs_done; /* numbers of fdatasyncs; where they differ one is under way */
};

/* sync_failed is the caller's, in the pool: it outlives the process. */
void tm_file_init(struct tm_file *file, int fd, uint64_t bytes, bool direct, _Atomic uint64_t *sync_failed);
void tm_file_destroy(struct tm_file *file);

/* A buffer of TM_RUN_MAX pages; NULL when memory is short. */
struct tm_bounce *tm_bounce_get(struct tm_file *file);
void tm_bounce_put(struct tm_file *file, struct tm_bounce *bounce);
/* Give back the memory of all buffers that nobody uses. */
void tm_bounces_release(struct tm_file *file);

/* Whole pages between an aligned buffer and the file; 0 or an errno. What lies beyond the file's end reads as zeros. */
int tm_file_read(struct tm_file *file, uint64_t page, uint32_t n, uint8_t *buffer);
int tm_file_write(struct tm_file *file, uint64_t page, uint32_t n, const uint8_t *buffer);
/* Zero n pages, keeping their blocks reserved where the file system can. */
int tm_file_zero(struct tm_file *file, uint64_t page, uint64_t n);
/* Make what was written before the call durable, by one fdatasync for all who ask meanwhile. Once one has failed this fails for
 * ever, for the kernel forgets what it could not write (PostgreSQL's data_sync_retry): 0 or EIO. */
int tm_file_sync(struct tm_file *file);
/* Whether one has failed. */
static inline bool tm_file_is_doubtful(const struct tm_file *file) { return file->fd >= 0 && atomic_load(file->sync_failed); }

#endif
