/* SPDX-License-Identifier: BSD-3-Clause */
/* Every latency falls into the bucket that layout.h and docs/pool-format.md name. Exit status 0 and
 * 'ok'. */
#include <stdio.h>
#include <stdlib.h>

#include "statistics.h"

static void check(uint64_t ns, unsigned bucket)
{
    if (stats_bucket(ns) == bucket)
        return;
    fprintf(stderr, "%llu ns is in bucket %u, not %u\n", (unsigned long long)ns, stats_bucket(ns),
            bucket);
    exit(1);
}

int main(void)
{
    check(0, 0);
    check(UINT64_MAX, TM_LATENCIES - 1);
    for (unsigned i = 0; i + 1 < TM_LATENCIES; i++) {
        uint64_t bound = (UINT64_C(256) + i % 2 * 128) << i / 2;
        check(bound - 1, i);
        check(bound, i + 1);
    }
    puts("ok");
    return 0;
}
