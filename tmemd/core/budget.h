/* SPDX-License-Identifier: BSD-3-Clause */
/* What the pool may take from the host: the target, the freeze, and what is free in the memory
 * cgroup. No lock: what is used is one atomic counter. */
#pragma once

#include <stddef.h>

#include "layout.h"
#include "tmem.h"

struct budget {
    int pool_fd;
    struct tm_counters *counters;
    const struct tm_control *control;
    uint64_t limit;
    bool has_file;
    _Atomic uint64_t last_target; /* the last one read whole */
    _Atomic bool draining;        /* puts are refused while a drain runs */
    struct tm_cgroup *cgroups;
    size_t n_cgroups;
};

int budget_init(struct budget *budget, const struct tm_config *config, struct tm_counters *counters,
                const struct tm_control *control);
void budget_destroy(struct budget *budget);

/* The target now, in bytes: what the control page says, within the device's limit. */
uint64_t budget_target(struct budget *budget);
/* The most that counters->demotion_writes may become without a user's request. */
uint64_t budget_demotion_bound(const struct budget *budget);
/* Whether puts are refused whatever memory is free. */
bool budget_is_refusing(struct budget *budget);
/* Whether not one page more can be taken. */
bool budget_is_full(struct budget *budget);

/* Bytes below the target that are not allocated. */
uint64_t budget_room(struct budget *budget);
/* Whether there is so much room below the target that promotion may take some of it. */
bool budget_has_room(struct budget *budget);
/* Whether pages are compressed; otherwise only those that repeat one word are. */
bool budget_is_compressing(const struct budget *budget);

/* Punch [offset, offset + bytes) out of the pool file, without accounting; 0 or an errno. */
int budget_punch(const struct budget *budget, uint64_t offset, uint64_t bytes);
/* Allocate [offset, offset + bytes) of the pool file where its use stays within `most` then: 0, or
 * the errno with which it was refused (ENOSPC: for `most`). It is allocated, hence zero, before it
 * is touched. */
int budget_allocate(struct budget *budget, uint64_t offset, uint64_t bytes, uint64_t most);
/* Give it back. */
void budget_free(struct budget *budget, uint64_t offset, uint64_t bytes);
