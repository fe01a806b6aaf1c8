/* SPDX-License-Identifier: BSD-3-Clause */
/* The page path: one device's pool in a tmpfs file, its backing file and its write-intent bitmap.
 *
 * Calls that return int return 0 or an errno (to the client each is EIO). All may be made from any
 * thread, but tm_open and tm_close. Offsets and counts are bytes of the device; the caller has
 * checked that they lie within it. tm_flush is in clean.c, tm_cache in promote.c,
 * tm_warm in prefetch.c. */
#pragma once

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "layout.h"

struct tm_device;
struct store;

struct tm_cgroup {
    int limit_fd, usage_fd; /* memory.max and memory.current, or their v1 names */
};

/* Whether pages are fetched ahead of reads; auto: while a miss takes long. */
enum tm_prefetch { TM_PREFETCH_NO, TM_PREFETCH_AUTO, TM_PREFETCH_YES };

struct tm_config {
    const char *name;
    int pool_fd, file_fd, bitmap_fd; /* file and bitmap: -1 for none; all stay the caller's */
    struct store *remote;            /* instead of file_fd, and of bitmap_fd if that is none */
    uint64_t bitmap_offset;          /* where the bitmap begins in its file; in the remote: not 0 */
    uint64_t size, limit;
    uint64_t
        region; /* bytes of the device that one bit of the bitmap speaks for; a multiple of 4 KiB */
    uint64_t file_bytes; /* how much of the file may be read and written */
    bool direct;         /* file_fd bypasses the page cache */
    bool lost_zero;      /* lost pages read as zeros */
    bool durable;   /* a write reaches the file before it is acknowledged, FLUSH and FUA sync it */
    bool ephemeral; /* the file is the device, and pages in tmem are copies that may go at any
                       moment; besides, it is durable and needs no bitmap */
    bool read_only; /* ephemeral: nobody may change the file, and nothing is read from it once
                       somebody has */
    _Atomic uint64_t *fence; /* as tm_fence says; it may be put off from the moment of opening on.
                                NULL: it has no lease */
    uint32_t fence_ms;       /* how long requests beyond it wait to see it put off */
    enum tm_prefetch prefetch;
    const struct tm_cgroup *cgroups;
    size_t n_cgroups;
};

/* Attach to a formatted pool: rebuild from its index, give back what no live word points at. On
 * failure, *error (of error_size bytes) says what is wrong. */
int tm_open(const struct tm_config *config, struct tm_device **device, char *error,
            size_t error_size);
void tm_close(struct tm_device *device);

int tm_read(struct tm_device *device, void *buffer, uint32_t count, uint64_t offset);
int tm_write(struct tm_device *device, const void *buffer, uint32_t count, uint64_t offset,
             bool fua);
/* Make a range read as zeros; a trim may leave partly covered pages as they are. */
int tm_zero(struct tm_device *device, uint64_t count, uint64_t offset, bool fua);
int tm_trim(struct tm_device *device, uint64_t count, uint64_t offset, bool fua);
int tm_flush(struct tm_device *device);
/* Bring pages of the range that are in the file into tmem, as far as puts are accepted. */
int tm_cache(struct tm_device *device, uint64_t count, uint64_t offset);
/* Fetch n pages from `first` on ahead, those that are in the file alone, into memory that nobody
 * needs. ENOSPC: there is none. */
int tm_warm(struct tm_device *device, uint64_t first, uint64_t n);

struct tm_extent {
    uint64_t offset, length;
    bool zero;
};
/* Describe [offset, offset + count) from its start in at most *n extents; sets *n. */
int tm_extents(struct tm_device *device, uint64_t count, uint64_t offset, struct tm_extent *extents,
               size_t *n);

enum tm_use { TM_ANY_USE, TM_USED_ONCE, TM_USED_AGAIN };
struct tm_filter {
    unsigned min_age; /* generations, below TM_GENERATIONS: younger pages stay */
    bool raw_only;    /* only incompressible pages go */
    bool bounded; /* the control page's bound on demotion's writes holds; what the file has already
                     costs none */
    enum tm_use use;
    bool keep;         /* they stay in tmem, clean */
    bool spares_ahead; /* pages that were fetched ahead, and not used since, stay */
    bool zeros;        /* pages of zeros that the file lacks are written, too */
};
/* Move the coldest of the pages chosen to the file until records of at least `bytes` are gone from
 * tmem; *freed tells how many. Pages of an ephemeral pool just go. It takes tm_compact to give
 * their memory back to the host. */
int tm_demote(struct tm_device *device, uint64_t bytes, struct tm_filter choice, uint64_t *freed);
/* Demote everything, make the file durable and the bitmap clean; puts are refused meanwhile. */
int tm_drain(struct tm_device *device);
/* From now on each write reaches the file before it is acknowledged, and FLUSH syncs it, as if the
 * device were durable; and the file has everything when this returns, with a clean bitmap. Pages
 * stay in tmem. Or (off) it is written back again. ENODATA: pages were lost, which nothing but the
 * bitmap could keep in mind. On an error it is as it was. */
int tm_write_through(struct tm_device *device, bool on);
/* Tell a store that gives room back of some pages that were trimmed and are in the file still;
 * *left: how many more there are. Returns 0 or an errno: those that met it are not tried again. */
int tm_pass_trims(struct tm_device *device, uint64_t *left);
/* Compact, trying to move at most `moves` records; returns the bytes given back. */
uint64_t tm_compact(struct tm_device *device, uint64_t moves);
/* GENERATION_SECONDS have passed: begin the next coldness generation. Those of an ephemeral pool
 * begin when enough pages have missed (admit.c); it only learns how old they are. */
void tm_begin_generation(struct tm_device *device);
/* Publish in the statistics what lies in tmem and in the file, by age. It looks at no page. */
void tm_publish_ages(struct tm_device *device);

/* A device's pages go to a save file, in order: set whole and crc, the rest to zero. */
struct tm_saving {
    bool whole;    /* all pages; else those alone that the file does not hold */
    uint64_t page; /* the next; after an error the one that could not be saved */
    uint64_t
        records; /* so far; of these, pages with their content, and pages that cannot be read */
    uint64_t pages, lost;
    uint64_t damaged, first_damaged; /* of the lost ones, those that were found damaged just now */
    uint32_t crc;                    /* CRC32C of all that was written, continued */
};
/* Fill a buffer of at least TM_SAVE_STEP bytes with records; *used: of how many, 0 at the end.
 * Returns 0 or an errno. Nobody else may use the device meanwhile. */
enum { TM_SAVE_STEP = 1 << 20 };
int tm_save(struct tm_device *device, struct tm_saving *saving, void *buffer, size_t size,
            size_t *used);

/* They come back, from the first on: set all to zero but the two that are the caller's. */
struct tm_restoring {
    uint64_t device_pages; /* of the device that they are of */
    uint32_t crc;          /* CRC32C of all before them; continued over what is taken */
    uint64_t page;         /* the next; after an error the one that is damaged or finds no room */
    uint64_t records;
    bool ended; /* the next record is the last one, which is the caller's */
};
/* Take as many whole records as the buffer holds; *used: their bytes. They are checked, and where
 * there is a device put there: it was made anew, and nobody else may use it meanwhile. Returns 0 or
 * an errno; EBADMSG: the record at *used is damaged. */
int tm_restore(struct tm_device *device, struct tm_restoring *restoring, const void *buffer,
               size_t size, size_t *used);
/* Of a device with a lease: no request is served from that time of CLOCK_BOOTTIME on, in ns, and
 * all I/O fails but that to the pool. A later call may put it off: requests wait for that, and fail
 * in the end; at once where the time is TM_LEASE_LOST, for it is another's. */
enum { TM_LEASE_LOST = 1 };
void tm_fence(struct tm_device *device, uint64_t at);
/* Have every request fail from now on, wait until those under way are done, and flush; or no
 * longer. */
int tm_stop(struct tm_device *device);
void tm_go_on(struct tm_device *device);

/* Note that the calling process serves the device from now on. */
void tm_publish_pid(struct tm_device *device);

/* Bytes of memory for records that hold no live slot. */
uint64_t tm_free_slot_bytes(struct tm_device *device);
/* Pages of an ephemeral pool that were read from its source, and are about to be put. */
uint64_t tm_staged(struct tm_device *device);
const struct tm_counters *tm_counters(const struct tm_device *device);
/* The counters of the doors, which they write themselves. */
struct tm_doors *tm_doors(struct tm_device *device);
/* Likewise of the server that has the file. */
struct tm_remote *tm_remote(struct tm_device *device);
/* Say in the pool, where it lasts, if a sync has failed that was no request's. */
void tm_note_failed_sync(struct tm_device *device);

/* A mapping of a file that others may truncate: a touch of what is gone finds zeros from then on in
 * all of it, and sets *lost. Returns 0 or an errno. */
int tm_watch_mapping(void *base, uint64_t bytes, _Atomic bool *lost);
void tm_forget_mapping(void *base);

enum tm_op { TM_READ, TM_WRITE, TM_ZERO_RANGE, TM_TRIM, TM_FLUSH };
/* Whether a request is likely to wait for the file: for callers who would rather have another
 * thread wait. A guess, which takes no lock. The range is not empty, but for TM_FLUSH. */
bool tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset);
