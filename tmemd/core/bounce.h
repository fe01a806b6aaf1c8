/* SPDX-License-Identifier: BSD-3-Clause */
/* Aligned buffers for runs of pages on their way to or from a file. All devices of the process
 * share those that are spare; one mutex, held for a few instructions. */
#pragma once

#include <stdint.h>

/* Pages of the longest run that is one read or write. */
enum { TM_RUN_MAX = 64 };

struct bounce {
    struct bounce *next;
    uint8_t *pages; /* TM_RUN_MAX */
};

/* NULL when memory is short. */
struct bounce *bounce_get(void);
void bounce_put(struct bounce *bounce);
/* Give back the memory of all that are spare. */
void bounce_release_spare(void);
