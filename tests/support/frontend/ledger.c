/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "ledger.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../content.h"
#include "common.h"

#define CLAIMED (UINT32_C(1) << 31)
#define ZEROED (UINT32_C(1) << 30) /* the page holds zeros since that version */

void ledger_open(struct ledger *ledger, const char *path, uint64_t pages)
{
    int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, pages * sizeof *ledger->versions) < 0)
        die(path, strerror(errno));
    ledger->pages = pages;
    ledger->versions =
        mmap(NULL, pages * sizeof *ledger->versions, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ledger->versions == MAP_FAILED)
        die(path, strerror(errno));
    close(fd);
}

static bool claim(uint32_t *version)
{
    return !(__atomic_fetch_or(version, CLAIMED, __ATOMIC_ACQUIRE) & CLAIMED);
}

static void let_go(uint32_t *version, uint32_t holds)
{
    __atomic_store_n(version, holds, __ATOMIC_RELEASE);
}

static void fill(uint8_t *data, uint64_t page, uint32_t version)
{
    if (version == 0 || version & ZEROED)
        memset(data, 0, PAGE);
    else
        fill_page((uint64_t *)data, page, version);
}

static uint32_t next_version(uint32_t word) { return (word & ~(CLAIMED | ZEROED)) + 1; }

bool ledger_begin(struct ledger *ledger, struct request *request)
{
    uint64_t first = request->offset / PAGE;
    unsigned pages = request->length / PAGE;

    for (unsigned i = 0; i < pages; i++) {
        if (claim(&ledger->versions[first + i]))
            continue;
        while (i-- > 0)
            let_go(&ledger->versions[first + i], ledger->versions[first + i] & ~CLAIMED);
        return false;
    }
    if (request->operation == OP_WRITE)
        for (unsigned i = 0; i < pages; i++)
            fill(request->data + i * PAGE, first + i, next_version(ledger->versions[first + i]));
    return true;
}

static bool is_right(const uint8_t *data, uint64_t page, uint32_t version)
{
    uint64_t wanted[WORDS];

    fill((uint8_t *)wanted, page, version);
    if (memcmp(data, wanted, PAGE) == 0)
        return true;
    fprintf(stderr, "frontend: page %llu does not hold its version %u\n", (unsigned long long)page,
            version & ~ZEROED);
    return false;
}

unsigned ledger_end(struct ledger *ledger, const struct request *request)
{
    uint64_t first = request->offset / PAGE;
    unsigned wrong = 0;

    for (unsigned i = 0; i < request->length / PAGE; i++) {
        uint32_t *version = &ledger->versions[first + i], holds = *version & ~CLAIMED;
        if (request->operation == OP_READ) {
            wrong += !request->failed && !is_right(request->data + i * PAGE, first + i, holds);
            let_go(version, holds);
        } else if (!request->failed) {
            let_go(version, next_version(holds) | (request->operation == OP_ZERO ? ZEROED : 0));
        }
    }
    return wrong;
}
