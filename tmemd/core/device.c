#define _GNU_SOURCE
#include "device.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sigbus.h"

/* Beside the header and the index: with less than this for records there is no room to work in. */
#define MINIMUM_RECORDS (UINT64_C(512) << 10)

static uint64_t round_up(uint64_t n, uint64_t to) { return (n + to - 1) / to * to; }

int tm_layout_for(uint64_t size, struct tm_layout *layout)
{
    if (!size || size > TM_MAX_SIZE)
        return EINVAL;
    layout->pages = (size + TM_PAGE - 1) / TM_PAGE;
    layout->blocks = (layout->pages + TM_BLOCK_PAGES - 1) / TM_BLOCK_PAGES;
    layout->index_offset = TM_STATES_OFFSET + round_up(layout->blocks, TM_PAGE);
    uint64_t index_bytes = layout->blocks * TM_PAGE;
    layout->data_offset = round_up(layout->index_offset + index_bytes, TM_SPAN_BYTES);
    /* Room for every page stored raw, what spans lose at their ends, and a partly filled span of each class. */
    uint64_t data = layout->pages * TM_SLOT_MAX / 16 * 17 + (uint64_t)TM_CLASSES * TM_SPAN_BYTES;
    layout->data_bytes = data < TM_MAX_DATA ? round_up(data, TM_SPAN_BYTES) : TM_MAX_DATA;
    layout->minimum = layout->index_offset + index_bytes + MINIMUM_RECORDS;
    return 0;
}

static int map_pool(struct tm_device *device, char *error, size_t error_size)
{
    struct stat status;
    device->mapped = device->layout.data_offset + device->layout.data_bytes;
    if (fstat(device->pool_fd, &status) < 0)
        return errno;
    if ((uint64_t)status.st_size != device->mapped) {
        snprintf(error, error_size, "the pool file is %jd bytes long, not %" PRIu64, (intmax_t)status.st_size,
                 device->mapped);
        return EINVAL;
    }
    /* Earlier versions left a hole here. */
    if (fallocate(device->pool_fd, FALLOC_FL_KEEP_SIZE, TM_STATISTICS_OFFSET, TM_PAGE) < 0)
        return errno;
    void *base = mmap(NULL, device->mapped, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, device->pool_fd, 0);
    if (base == MAP_FAILED)
        return errno;
    device->base = base;
    madvise(base, device->mapped, MADV_DONTDUMP); /* guests' memory has no place in a core file */
    device->counters = (struct tm_counters *)(device->base + TM_COUNTERS_OFFSET);
    device->control = (const struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    device->statistics = (struct tm_statistics *)(device->base + TM_STATISTICS_OFFSET);
    device->states = (_Atomic uint8_t *)(device->base + TM_STATES_OFFSET);
    device->index = (_Atomic uint64_t *)(device->base + device->layout.index_offset);
    return tm_sigbus_watch(base, device->mapped, device->name);
}

static int init_parts(struct tm_device *device, const struct tm_config *config, char *error, size_t error_size)
{
    struct tm_counters *counters = device->counters;
    int failed = tm_budget_init(&device->budget, config, counters, device->control);
    if (!failed)
        failed = tm_slots_init(&device->slots, device->pool_fd, device->base + device->layout.data_offset,
                               &device->layout, &device->budget);
    if (!failed) {
        failed = tm_map_init(&device->map, config->bitmap_fd, config->region, &device->layout, counters);
        if (failed)
            snprintf(error, error_size, "the map of its backing file cannot be read or synced: %s", strerror(failed));
    }
    tm_heat_init(device);
    tm_file_init(&device->file, config->file_fd, config->file_bytes, config->direct, &counters->sync_failed);
    atomic_store(&counters->limit, config->limit);
    atomic_store(&counters->minimum, device->layout.minimum);
    return failed;
}

/* A device that is not durable: the map says what the file may lack, whoever wrote it and in whatever way. */
static int begin_with_map(struct tm_device *device)
{
    int error = 0;
    if (tm_file_sync(&device->file) == 0 && tm_mend(device) == 0)
        return tm_mark_dirty(device);
    for (uint64_t page = 0; page < device->layout.pages && !error; page += device->map.granule_pages)
        error = tm_map_mark(&device->map, page, 1);
    return error;
}

/* A durable device begins with all pages in the file and the map clear, for it does not keep the map. Where a sync has failed it is
 * served all the same, for its pages can be read, and each FLUSH says so. */
static int begin_without_map(struct tm_device *device, char *error, size_t error_size)
{
    if (tm_file_sync(&device->file) != 0)
        return 0;
    int failed = tm_mend(device);
    if (!failed)
        failed = tm_clean(device);
    uint64_t lost = atomic_load(&device->counters->granules_set);
    if (failed || !lost)
        return failed;
    snprintf(error, error_size, "pages were lost with the host in %" PRIu64 " regions of %" PRIu64 " MiB, and flush=durable "
             "cannot keep that in mind: make them zeros with lost=zero, or serve it without flush=durable until the "
             "guest has trimmed them", lost, device->map.granule_pages * TM_PAGE >> 20);
    return EINVAL;
}

static int open_device(struct tm_device *device, const struct tm_config *config, char *error, size_t error_size)
{
    int failed = tm_layout_for(config->size, &device->layout);
    if (!failed)
        failed = map_pool(device, error, error_size);
    if (!failed)
        failed = init_parts(device, config, error, error_size);
    if (!failed)
        failed = tm_index_attach(device, error, error_size);
    if (failed || !tm_has_file(device))
        return failed;
    atomic_store(&device->amiss, 1); /* as far as we know */
    return device->durable ? begin_without_map(device, error, error_size) : begin_with_map(device);
}

int tm_open(const struct tm_config *config, struct tm_device **opened, char *error, size_t error_size)
{
    struct tm_device *device = calloc(1, sizeof *device);
    *error = 0;
    if (!device)
        return ENOMEM;
    snprintf(device->name, sizeof device->name, "%s", config->name);
    device->size = config->size;
    device->pool_fd = config->pool_fd;
    device->lost_zero = config->lost_zero;
    device->durable = config->durable;
    device->file.fd = -1;
    device->map.fd = -1;
    tm_locks_init(&device->locks);
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
    if (device->base) {
        tm_sigbus_forget(device->base);
        munmap(device->base, device->mapped);
    }
    tm_slots_destroy(&device->slots);
    tm_budget_destroy(&device->budget);
    tm_map_destroy(&device->map);
    tm_file_destroy(&device->file);
    tm_locks_destroy(&device->locks);
    free(device);
}

void tm_serve(struct tm_device *device) { atomic_store(&device->counters->pid, (uint64_t)getpid()); }

uint64_t tm_over_target(struct tm_device *device)
{
    uint64_t used = atomic_load(&device->counters->used), target = tm_target(&device->budget);
    return tm_has_file(device) && used > target ? used - target : 0; /* without a file nothing can be given back */
}

uint64_t tm_room(struct tm_device *device)
{
    uint64_t used = atomic_load(&device->counters->used), target = tm_target(&device->budget);
    return used < target ? target - used : 0;
}

uint64_t tm_wasted(struct tm_device *device) { return tm_slots_free_bytes(&device->slots); }

const struct tm_counters *tm_counters(const struct tm_device *device) { return device->counters; }
