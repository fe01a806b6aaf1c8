/* SPDX-License-Identifier: BSD-3-Clause */
/* The pool file: its parts, and the pages of its header; docs/pool-format.md says it in prose. */
#pragma once

#include <stdatomic.h>
#include <stdint.h>

/* What Python repeats of these tests/unit/test_layout.py holds against them. */
enum {
    TM_PAGE = 4096,
    TM_BLOCK_PAGES = 512, /* pages whose index words share one page of the index */
    TM_COUNTERS_OFFSET = TM_PAGE,
    TM_CONTROL_OFFSET = 2 * TM_PAGE,
    TM_STATISTICS_OFFSET = 3 * TM_PAGE,
    TM_STATES_OFFSET = 4 * TM_PAGE,
    TM_SPAN_BYTES = 64 * TM_PAGE, /* 64 pages, so that one word says which of them are allocated */
    TM_SPAN_PAGES = TM_SPAN_BYTES / TM_PAGE,
    TM_SLOT_ALIGN = 16,
    TM_SLOT_MIN = 32,
    TM_RECORD_HEADER = 12,
    TM_SLOT_MAX = 4112, /* a raw page and its header, rounded up */
    TM_SIZE_CLASSES = TM_SLOT_MAX / TM_SLOT_ALIGN + 1,
};

#define TM_MAX_SIZE (UINT64_C(1) << 44) /* page numbers are 32 bits in records */
#define TM_MAX_DATA (UINT64_C(1) << 40) /* locations are 36 bits of 16 bytes */

/* What all pages of a block of a new pool are; attaching writes it into the index. */
enum tm_block_state { TM_STATE_INDEX = 0, TM_STATE_FILE = 1, TM_STATE_LOST = 2, TM_STATE_ZERO = 3 };

#define TM_GENERATIONS 16u
#define TM_PROMOTE_AGE 6u /* younger pages that are read from the file are put again */
#define TM_ANCIENT (TM_GENERATIONS - 1) /* the age of generation 0; the others take turns */

/* The counters page; tmemd.store.poolfile.Counters names the same fields in the same order. Writer:
 * the serving process, which keeps its answers to requests in the page's second half
 * (tmemd.store.requests). */
struct tm_counters {
    _Atomic uint64_t used, limit, minimum;
    _Atomic uint64_t pages_in_tmem, pages_in_file, pages_lost;
    _Atomic uint64_t payload_bytes, index_bytes;
    _Atomic uint64_t puts, puts_refused, puts_zero, puts_same, puts_raw;
    _Atomic uint64_t gets, file_reads, invalidates, spills, demotions, moves;
    _Atomic uint64_t bad_checksums, io_errors;
    _Atomic uint64_t reads, writes, trims, flushes;
    _Atomic uint64_t regions_set, pid;
    _Atomic uint64_t demotion_writes, promotions;
    _Atomic uint64_t sync_failed; /* not 0: what was written to the file before may be lost,
                                     whatever later syncs say */
    _Atomic uint64_t fenced_at;   /* ns of CLOCK_BOOTTIME: from then on it is not served, unless the
                                     lease is renewed (fence.h); 0: there is none */
    _Atomic uint64_t prefetching; /* not 0: pages are fetched ahead now */
    _Atomic uint64_t prefetches, prefetch_hits, prefetch_wastes;
};

/* Latencies of one kind of page operation. The bounds are two in each octave: counts[2k] is of
 * those below 256 * 2^k ns, counts[2k + 1] of those from there below 384 * 2^k ns; the last is of
 * all that took longer. */
enum { TM_LATENCIES = 47 };
struct tm_histogram {
    _Atomic uint64_t sum_ns, counts[TM_LATENCIES];
};

/* Who came in through which door, and what the virtio door did; tmemd.store.poolfile.Doors names
 * the same fields. Writer: the serving process. */
struct tm_doors {
    _Atomic uint64_t nbd, vhost;         /* connections now */
    _Atomic uint64_t requests, failures; /* by virtio; failures: of requests, whoever's fault */
    _Atomic uint64_t kicks, interrupts;  /* from the guest, to the guest */
    _Atomic uint64_t polls, polls_won;   /* watched a queue before sleeping; and something came */
    struct tm_histogram request;         /* of one in sixteen: from its being found in the queue
                                            until it is answered */
};

/* How the NBD server is that has the file; tmemd.store.poolfile.RemoteState names the same fields.
 * Writer: the serving process. */
struct tm_remote {
    _Atomic uint64_t published;             /* not 0: there is one */
    _Atomic uint64_t connections, connects; /* now, ever */
    _Atomic uint64_t losses;                /* of connections */
    _Atomic uint64_t time_outs, repeats;    /* requests failed, and sent again */
    _Atomic uint64_t away_ms;               /* since none is connected */
    _Atomic uint64_t overflow;              /* pages in the local file instead */
    _Atomic uint64_t trims;                 /* pages that it was told to forget */
    _Atomic uint64_t export_bytes,
        abilities; /* what the export was like when it was last there
                      (remote_know): kept while nobody serves the device */
};

/* The statistics page; tmemd.store.poolfile.Latencies and Ages name the same fields. Writer: the
 * serving process. What is 'by age' is indexed by how many generations ago the page was last put or
 * read; the last entry is of all that are older. */
struct tm_statistics {
    struct tm_histogram put, get, spill, file_read;
    _Atomic uint64_t gets_by_age[TM_GENERATIONS], file_reads_by_age[TM_GENERATIONS];
    _Atomic uint64_t freed_by_age[TM_GENERATIONS];  /* pages, in tmem or in the file, that were
                                                       overwritten or trimmed */
    _Atomic uint64_t stored_by_age[TM_GENERATIONS]; /* as last published: bytes of slots */
    _Atomic uint64_t
        raw_by_age[TM_GENERATIONS]; /* of these, bytes of slots of incompressible pages */
    _Atomic uint64_t in_file_by_age[TM_GENERATIONS]; /* as last published: pages in the file */
    _Atomic uint64_t ages_published;
    _Atomic uint64_t generation; /* now: 1 to TM_ANCIENT */
    struct tm_doors doors;
    struct tm_remote remote;
};

_Static_assert(sizeof(struct tm_statistics) <= TM_PAGE,
               "the statistics do not fit into their page");

/* A word of the control page and its complement: a torn write does not match and is ignored. */
struct tm_checked {
    _Atomic uint64_t value, complement;
};

/* The control page's first words; requests follow (tmemd.store.requests). Writer: whoever controls
 * the pools, another process. */
struct tm_control {
    struct tm_checked target, frozen;
    struct tm_checked demotion_writes; /* pages that demotion may have written to the file, ever;
                                          none: no bound */
    struct tm_checked compression;     /* 0: store pages as they are */
};

/* Where the parts of a pool file lie, in bytes. */
struct tm_layout {
    uint64_t pages, blocks;
    uint64_t index_offset, data_offset, data_bytes;
    uint64_t minimum; /* the least limit and target: header, index, and some records */
};

/* Fill *layout for a device of size bytes; EINVAL when it is 0 or too big. */
int tm_layout_for(uint64_t size, struct tm_layout *layout);
