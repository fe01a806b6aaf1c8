/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "budget.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A cgroup at its limit kills instead of answering ENOSPC. Leave this much free: 256 threads, of
 * any number of processes, may allocate between two reads. They are read every time, 2 to 4 us
 * beside the 17 us that 16 pages take: with a cached value 64 devices overran the limit. */
#define CGROUP_MARGIN (UINT64_C(16) << 20)

/* The part of the target that promotion leaves to writes. Of what is kept free little more than
 * this is ever missing between two looks of the maintenance thread: with a 32nd, pages that came
 * back in between found no room, more of them the busier the machine
 * (docs/decisions/0004-cold-pages-make-room.md). */
enum { ROOM_SHARE = 256 };

int budget_init(struct budget *budget, const struct tm_config *config, struct tm_counters *counters,
                const struct tm_control *control)
{
    *budget = (struct budget){
        .pool_fd = config->pool_fd,
        .counters = counters,
        .control = control,
        .limit = config->limit,
        .has_file = config->file_fd >= 0 || config->remote,
        .last_target = config->limit,
        .n_cgroups = config->n_cgroups,
    };
    if (!config->n_cgroups)
        return 0;
    budget->cgroups = calloc(config->n_cgroups, sizeof *budget->cgroups);
    if (!budget->cgroups)
        return ENOMEM;
    memcpy(budget->cgroups, config->cgroups, config->n_cgroups * sizeof *budget->cgroups);
    return 0;
}

void budget_destroy(struct budget *budget) { free(budget->cgroups); }

static bool read_checked(const struct tm_checked *word, uint64_t *value)
{
    *value = atomic_load_explicit(&word->value, memory_order_relaxed);
    return (*value ^ atomic_load_explicit(&word->complement, memory_order_relaxed)) == UINT64_MAX;
}

uint64_t budget_target(struct budget *budget)
{
    uint64_t target;
    if (read_checked(&budget->control->target, &target))
        atomic_store_explicit(&budget->last_target, target, memory_order_relaxed);
    else
        target = atomic_load_explicit(&budget->last_target, memory_order_relaxed);
    if (target > budget->limit)
        target = budget->limit;
    uint64_t used = atomic_load_explicit(&budget->counters->used, memory_order_relaxed);
    return !budget->has_file && target < used ? used : target;
}

uint64_t budget_demotion_bound(const struct budget *budget)
{
    uint64_t bound;
    return read_checked(&budget->control->demotion_writes, &bound) ? bound : UINT64_MAX;
}

bool budget_is_refusing(struct budget *budget)
{
    uint64_t frozen;
    return (read_checked(&budget->control->frozen, &frozen) && frozen) ||
           atomic_load(&budget->draining) ||
           atomic_load_explicit(&budget->counters->used, memory_order_relaxed) >
               budget_target(budget);
}

uint64_t budget_room(struct budget *budget)
{
    uint64_t target = budget_target(budget),
             used = atomic_load_explicit(&budget->counters->used, memory_order_relaxed);
    return target > used ? target - used : 0;
}

bool budget_has_room(struct budget *budget)
{
    return budget_room(budget) >= budget_target(budget) / ROOM_SHARE;
}

bool budget_is_compressing(const struct budget *budget)
{
    uint64_t compression;
    return !read_checked(&budget->control->compression, &compression) || compression;
}

bool budget_is_full(struct budget *budget)
{
    return atomic_load_explicit(&budget->counters->used, memory_order_relaxed) + TM_PAGE >
           budget_target(budget);
}

static bool read_number(int fd, uint64_t *number)
{
    char text[32];
    ssize_t n = pread(fd, text, sizeof text - 1, 0);
    if (n <= 0)
        return false;
    text[n] = 0;
    *number = strncmp(text, "max", 3) == 0 ? UINT64_MAX : strtoull(text, NULL, 10);
    return true;
}

/* Bytes free in the tightest cgroup, less the margin; a file that cannot be read does not bind. */
static uint64_t free_in_cgroups(const struct budget *budget)
{
    uint64_t room = UINT64_MAX;
    for (size_t i = 0; i < budget->n_cgroups; i++) {
        uint64_t limit, usage;
        if (!read_number(budget->cgroups[i].limit_fd, &limit) ||
            !read_number(budget->cgroups[i].usage_fd, &usage))
            continue;
        uint64_t here = limit > usage + CGROUP_MARGIN ? limit - usage - CGROUP_MARGIN : 0;
        room = here < room ? here : room;
    }
    return room;
}

static bool charge(struct budget *budget, uint64_t bytes, uint64_t most)
{
    uint64_t used = atomic_load_explicit(&budget->counters->used, memory_order_relaxed);
    do {
        if (used + bytes > most)
            return false;
    } while (!atomic_compare_exchange_weak(&budget->counters->used, &used, used + bytes));
    return true;
}

int budget_punch(const struct budget *budget, uint64_t offset, uint64_t bytes)
{
    return fallocate(budget->pool_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                     (off_t)bytes) < 0
               ? errno
               : 0;
}

int budget_allocate(struct budget *budget, uint64_t offset, uint64_t bytes, uint64_t most)
{
    if (!charge(budget, bytes, most))
        return ENOSPC;
    int error = bytes <= free_in_cgroups(budget) ? 0 : ENOMEM;
    if (!error && fallocate(budget->pool_fd, FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)bytes) < 0)
        error = errno; /* what it had allocated before that tmpfs has undone (mm/shmem.c,
                          shmem_fallocate) */
    if (error)
        atomic_fetch_sub(&budget->counters->used, bytes);
    return error;
}

void budget_free(struct budget *budget, uint64_t offset, uint64_t bytes)
{
    budget_punch(budget, offset, bytes);
    atomic_fetch_sub(&budget->counters->used, bytes);
}
