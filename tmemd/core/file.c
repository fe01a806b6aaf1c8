/* SPDX-License-Identifier: BSD-3-Clause */
#include "file.h"

#include <errno.h>
#include <string.h>

int file_init(struct file *file, const struct tm_config *config, const struct fence *fence,
              _Atomic uint64_t *sync_failed)
{
    *file = (struct file){.fence = fence, .bytes = config->file_bytes, .sync_failed = sync_failed};
    syncs_init(&file->syncs);
    if (config->remote) {
        file->store = config->remote;
        file->store->fence = fence;
        store_recall_failure(file->store, sync_failed);
    } else if (config->file_fd >= 0) {
        file->store = &file->local.store;
    }
    return file->store == &file->local.store
               ? local_init(&file->local, config->file_fd, !config->direct,
                            config->ephemeral && config->read_only)
               : 0;
}

void file_destroy(struct file *file)
{
    local_destroy(&file->local);
    syncs_destroy(&file->syncs);
}

/* Bytes of the run that the file has. */
static size_t clamp(const struct file *file, uint64_t offset, uint64_t length)
{
    return offset >= file->bytes           ? 0
           : length < file->bytes - offset ? length
                                           : file->bytes - offset;
}

int file_read(struct file *file, uint64_t page, uint32_t n, uint8_t *buffer)
{
    size_t whole = (size_t)n * TM_PAGE, length = clamp(file, page * TM_PAGE, whole);
    if (fence_is_reached(file->fence))
        return EIO;
    int error = length ? file->store->ops->read(file->store, page * TM_PAGE, length, buffer) : 0;
    if (!error)
        memset(buffer + length, 0, whole - length);
    return error;
}

int file_write(struct file *file, uint64_t page, uint32_t n, const uint8_t *buffer, bool through)
{
    size_t length = clamp(file, page * TM_PAGE, (uint64_t)n * TM_PAGE);
    if (fence_is_reached(file->fence))
        return EIO;
    int error =
        length ? file->store->ops->write(file->store, page * TM_PAGE, length, buffer, through) : 0;
    if (error)
        store_note_failure(file->store, file->sync_failed);
    return error;
}

static int write_zeros(struct file *file, uint64_t page, uint64_t n, bool through)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    memset(bounce->pages, 0, (size_t)TM_RUN_MAX * TM_PAGE);
    int error = 0;
    while (n && !error) {
        uint32_t run = n < TM_RUN_MAX ? (uint32_t)n : TM_RUN_MAX;
        error = file_write(file, page, run, bounce->pages, through);
        page += run;
        n -= run;
    }
    bounce_put(bounce);
    return error;
}

int file_zero(struct file *file, uint64_t page, uint64_t n, bool punch, bool through)
{
    size_t length = clamp(file, page * TM_PAGE, n * TM_PAGE);
    if (fence_is_reached(file->fence))
        return EIO;
    int error =
        length ? file->store->ops->zero(file->store, page * TM_PAGE, length, punch, through) : 0;
    if (error)
        store_note_failure(file->store, file->sync_failed);
    return error == ENOTSUP ? write_zeros(file, page, n, through) : error;
}

/* Of the store, noted if it fails before another begins. */
static int sync_store(void *owner)
{
    struct file *file = owner;
    int error = file_is_doubtful(file) ? EIO : file->store->ops->sync(file->store);
    if (error && error != EAGAIN)
        atomic_store(file->sync_failed, 1);
    return error;
}

int file_sync(struct file *file)
{
    if (fence_is_reached(file->fence) || file_is_doubtful(file))
        return EIO;
    int error = syncs_join(&file->syncs, sync_store, file);
    return file_is_doubtful(file) ? EIO : error;
}
