/* SPDX-License-Identifier: BSD-3-Clause */
/* The load: which requests are made, and what came of them. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "door.h"
#include "latency.h"
#include "ledger.h"

struct load {
    struct door *door;
    struct request *requests;
    unsigned depth;
    uint64_t first, blocks; /* blocks of the device that requests go to */
    uint32_t block;         /* bytes of each request */
    unsigned shares[3];     /* how many of each operation to how many of the others */
    bool sequential;
    uint64_t count;        /* requests to make; 0: until the time is over */
    uint64_t duration;     /* in ns */
    double rate;           /* requests a second; below zero: as many as there can be */
    double patience;       /* seconds to wait for a server that has gone; 0: do not */
    uint64_t random;       /* state */
    struct ledger *ledger; /* NULL: contents are the corpus's, and nobody checks them */
    uint8_t *corpus;
    uint64_t corpus_pages;
};

struct result {
    uint64_t requests, failed, wrong, returns; /* wrong: pages; returns: of the server */
    uint64_t elapsed;                          /* ns */
    struct latency latency;
};

void load_run(struct load *load, struct result *result);
