/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "aging.h"
#include "attach.h"
#include "clean.h"
#include "dead.h"
#include "prefetch.h"
#include "recheck.h"
#include "sigbus.h"

static int map_pool(struct tm_device *device, char *error, size_t error_size)
{
    struct stat status;
    device->mapped = device->layout.data_offset + device->layout.data_bytes;
    if (fstat(device->pool_fd, &status) < 0)
        return errno;
    if ((uint64_t)status.st_size != device->mapped) {
        snprintf(error, error_size, "the pool file is %jd bytes long, not %" PRIu64,
                 (intmax_t)status.st_size, device->mapped);
        return EINVAL;
    }
    /* Earlier versions left a hole here. */
    if (fallocate(device->pool_fd, FALLOC_FL_KEEP_SIZE, TM_STATISTICS_OFFSET, TM_PAGE) < 0)
        return errno;
    void *base = mmap(NULL, device->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
                      device->pool_fd, 0);
    if (base == MAP_FAILED)
        return errno;
    device->base = base;
    madvise(base, device->mapped, MADV_DONTDUMP); /* guests' memory has no place in a core file */
    device->counters = (struct tm_counters *)(device->base + TM_COUNTERS_OFFSET);
    device->control = (const struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    device->statistics = (struct tm_statistics *)(device->base + TM_STATISTICS_OFFSET);
    device->states = (_Atomic uint8_t *)(device->base + TM_STATES_OFFSET);
    device->index = (_Atomic uint64_t *)(device->base + device->layout.index_offset);
    return sigbus_watch(base, device->mapped, device->name);
}

static int init_parts(struct tm_device *device, const struct tm_config *config, char *error,
                      size_t error_size)
{
    struct tm_counters *counters = device->counters;
    device->fence =
        (struct fence){.at = config->fence, .wait_ns = (uint64_t)config->fence_ms * 1000000};
    atomic_store(&counters->fenced_at, config->fence ? atomic_load(config->fence) : 0);
    int failed = budget_init(&device->budget, config, counters, device->control);
    if (!failed)
        failed = slots_init(&device->slots, device->base + device->layout.data_offset,
                            &device->layout, &device->budget);
    if (!failed) {
        failed = bitmap_init(&device->bitmap, config, &device->fence, &device->layout, counters);
        if (failed)
            snprintf(error, error_size,
                     "the bitmap of its backing file cannot be read or synced: %s",
                     strerror(failed));
    }
    aging_init(device);
    if (!failed)
        failed = file_init(&device->file, config, &device->fence, &counters->sync_failed);
    if (!failed)
        failed = dead_init(device);
    prefetch_init(device, config->prefetch);
    atomic_store(&counters->limit, config->limit);
    atomic_store(&counters->minimum, device->layout.minimum);
    return failed;
}

/* A write-back device: the bitmap says what the file may lack, whoever served it before. */
static int begin_with_bitmap(struct tm_device *device)
{
    int error = 0;
    if (file_sync_through(&device->file) == 0 && clean_resync(device) == 0)
        return 0;
    for (uint64_t page = 0; page < device->layout.pages && !error;
         page += device->bitmap.region_pages)
        error = bitmap_set(&device->bitmap, page, 1);
    return error;
}

/* A durable device does not keep the bitmap, so it must begin clear, with all pages in the file.
 * After a failed sync it is served all the same, for its pages can be read, and each FLUSH fails.
 */
static int begin_without_bitmap(struct tm_device *device, char *error, size_t error_size)
{
    if (file_is_doubtful(&device->file) || file_sync_through(&device->file) != 0)
        return 0;
    int failed = clean_resync(device);
    if (!failed)
        failed = recheck_file(device);
    if (!failed)
        failed = clean_regions(device);
    uint64_t lost = atomic_load(&device->counters->regions_set);
    if (failed || !lost)
        return failed;
    snprintf(error, error_size,
             "pages were lost with the host in %" PRIu64 " regions of %" PRIu64
             " MiB, and flush=durable "
             "cannot keep that in mind: make them zeros with lost=zero, or serve it without "
             "flush=durable until the "
             "guest has trimmed them",
             lost, device->bitmap.region_pages * TM_PAGE >> 20);
    return EINVAL;
}

/* A durable device whose map is clear has left nothing that is not synced. */
static void note_inherited(struct tm_device *device)
{
    const struct store *store = device->file.store;
    if (store->inherited)
        atomic_store(store->inherited,
                     !state_is_durable(device) || atomic_load(&device->counters->regions_set));
}

static int open_device(struct tm_device *device, const struct tm_config *config, char *error,
                       size_t error_size)
{
    int failed = tm_layout_for(config->size, &device->layout);
    if (!failed)
        failed = map_pool(device, error, error_size);
    if (!failed)
        failed = init_parts(device, config, error, error_size);
    if (!failed)
        failed = attach_index(device, error, error_size);
    if (failed || !state_has_file(device) || device->ephemeral)
        return failed;
    note_inherited(device);
    return state_is_durable(device) ? begin_without_bitmap(device, error, error_size)
                                    : begin_with_bitmap(device);
}

int tm_open(const struct tm_config *config, struct tm_device **opened, char *error,
            size_t error_size)
{
    struct tm_device *device = calloc(1, sizeof *device);
    *error = 0;
    if (!device)
        return ENOMEM;
    snprintf(device->name, sizeof device->name, "%s", config->name);
    device->size = config->size;
    device->pool_fd = config->pool_fd;
    device->lost_zero = config->lost_zero;
    bool durable = config->durable || config->ephemeral;
    atomic_init(&device->mode, durable ? STATE_DURABLE : STATE_WRITE_BACK);
    device->ephemeral = config->ephemeral;
    locks_init(&device->locks);
    staging_init(&device->staging);
    ahead_init(&device->prefetch.ahead);
    pthread_mutex_init(&device->prefetch.lock, NULL);
    pthread_mutex_init(&device->demote_lock, NULL);
    int failed = open_device(device, config, error, error_size);
    if (failed) {
        if (!*error)
            snprintf(error, error_size, "%s", strerror(failed));
        tm_close(device);
        return failed;
    }
    *opened = device;
    return 0;
}

void tm_close(struct tm_device *device)
{
    ahead_destroy(&device->prefetch.ahead);
    pthread_mutex_destroy(&device->prefetch.lock);
    staging_destroy(&device->staging);
    if (device->base) {
        sigbus_forget(device->base);
        munmap(device->base, device->mapped);
    }
    slots_destroy(&device->slots);
    budget_destroy(&device->budget);
    bitmap_destroy(&device->bitmap);
    file_destroy(&device->file);
    dead_destroy(device);
    locks_destroy(&device->locks);
    free(device);
}

void tm_fence(struct tm_device *device, uint64_t at)
{
    atomic_store(device->fence.at, at);
    atomic_store(&device->counters->fenced_at, at);
}

void tm_go_on(struct tm_device *device) { atomic_store(&device->fence.stopped, false); }

void tm_publish_pid(struct tm_device *device)
{
    atomic_store(&device->counters->pid, (uint64_t)getpid());
    atomic_store(&device->statistics->doors.nbd, 0);
    atomic_store(&device->statistics->doors.vhost, 0);
    atomic_store(&device->statistics->remote.published, 0);
    atomic_store(&device->statistics->remote.trims, 0);
}

uint64_t tm_free_slot_bytes(struct tm_device *device) { return slots_free_bytes(&device->slots); }

uint64_t tm_staged(struct tm_device *device) { return staging_waiting(&device->staging); }

const struct tm_counters *tm_counters(const struct tm_device *device) { return device->counters; }

struct tm_doors *tm_doors(struct tm_device *device) { return &device->statistics->doors; }

struct tm_remote *tm_remote(struct tm_device *device) { return &device->statistics->remote; }

void tm_note_failed_sync(struct tm_device *device)
{
    store_note_failure(device->file.store, device->file.sync_failed);
}
