/* SPDX-License-Identifier: BSD-3-Clause */
/* Which version of each page a device holds: a file that any number of processes share, so that
 * each can check what the others wrote, through whichever door.
 *
 * One 32-bit word a page. Who means to read or write a page claims it first; who finds it claimed
 * chooses another. A page whose write failed, or whose writer was killed, stays claimed: it may
 * hold either version. A new, empty ledger speaks of a device that was never written. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "door.h"

struct ledger {
    uint32_t *versions;
    uint64_t pages;
};

void ledger_open(struct ledger *ledger, const char *path, uint64_t pages);
/* Claim the pages of a request; for a write, fill in its data. False: one of them is in use. */
bool ledger_begin(struct ledger *ledger, struct request *request);
/* Note what a request did and let go of its pages; returns how many of those read were wrong. */
unsigned ledger_end(struct ledger *ledger, const struct request *request);
