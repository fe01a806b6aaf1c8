/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* Without O_DIRECT: drop the page cache after this many bytes written. */
#define DROP_EVERY (UINT64_C(8) << 20)

/* Have every write to the file noticed, as far as the user may have more of inotify: those through
 * a mapping when whoever could write closes it. */
static int watch(struct file *file)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", file->fd);
    file->notices = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (file->notices >= 0 &&
        inotify_add_watch(file->notices, path, IN_MODIFY | IN_CLOSE_WRITE) < 0) {
        close(file->notices);
        file->notices = -1;
    }
    return fstat(file->fd, &file->opened) < 0 ? errno : 0;
}

int file_init(struct file *file, const struct tm_config *config, _Atomic uint64_t *sync_failed)
{
    *file = (struct file){.fd = config->file_fd,
                          .bytes = config->file_bytes,
                          .direct = config->direct,
                          .immutable = config->ephemeral && config->read_only,
                          .notices = -1,
                          .sync_failed = sync_failed};
    pthread_mutex_init(&file->lock, NULL);
    pthread_cond_init(&file->synced, NULL);
    return file->immutable ? watch(file) : 0;
}

void file_destroy(struct file *file)
{
    if (file->immutable && file->notices >= 0)
        close(file->notices);
    pthread_mutex_destroy(&file->lock);
    pthread_cond_destroy(&file->synced);
}

/* Bytes of the run that the file has. */
static size_t clamp(const struct file *file, uint64_t offset, uint64_t length)
{
    return offset >= file->bytes           ? 0
           : length < file->bytes - offset ? length
                                           : file->bytes - offset;
}

static bool is_same_time(struct timespec one, struct timespec other)
{
    return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

/* Whoever writes to a file changes its times first (Linux: generic_file_write_iter). Who renames or
 * replaces it changes st_ctim alone, and so does, at last, who writes to it and sets st_mtim back:
 * of that there is a notice. The times of a block device say nothing. */
static bool has_changed(const struct file *file)
{
    const struct stat *then = &file->opened;
    struct stat now;
    int notices;
    if (fstat(file->fd, &now) < 0 || now.st_size != then->st_size)
        return true;
    if (!S_ISREG(now.st_mode))
        return false;
    if (!is_same_time(now.st_mtim, then->st_mtim))
        return true;
    return !is_same_time(now.st_ctim, then->st_ctim) &&
           (ioctl(file->notices, FIONREAD, &notices) < 0 || notices > 0);
}

int file_read(struct file *file, uint64_t page, uint32_t n, uint8_t *buffer)
{
    uint64_t offset = page * TM_PAGE;
    size_t length = clamp(file, offset, (uint64_t)n * TM_PAGE), done = 0;
    while (done < length) {
        ssize_t got = pread(file->fd, buffer + done, length - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno;
        if (got == 0)
            return EIO; /* shorter than it was: somebody truncated it */
        done += (size_t)got;
    }
    if (file->immutable && has_changed(file))
        return ESTALE; /* looked at after the read, for it may have changed during that */
    memset(buffer + length, 0, (size_t)n * TM_PAGE - length);
    if (!file->direct)
        posix_fadvise(file->fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
    return 0;
}

static void drop_cache(struct file *file, uint64_t offset, uint64_t length)
{
    sync_file_range(file->fd, (off_t)offset, (off_t)length, SYNC_FILE_RANGE_WRITE);
    if (atomic_fetch_add(&file->undropped, length) + length < DROP_EVERY)
        return;
    atomic_store(&file->undropped, 0);
    posix_fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED);
}

int file_write(struct file *file, uint64_t page, uint32_t n, const uint8_t *buffer)
{
    uint64_t offset = page * TM_PAGE;
    size_t length = clamp(file, offset, (uint64_t)n * TM_PAGE), done = 0;
    while (done < length) {
        ssize_t put = pwrite(file->fd, buffer + done, length - done, (off_t)(offset + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? errno : EIO;
        done += (size_t)put;
    }
    if (!file->direct)
        drop_cache(file, offset, length);
    return 0;
}

static int write_zeros(struct file *file, uint64_t page, uint64_t n)
{
    struct bounce *bounce = bounce_get();
    if (!bounce)
        return ENOMEM;
    memset(bounce->pages, 0, (size_t)TM_RUN_MAX * TM_PAGE);
    int error = 0;
    while (n && !error) {
        uint32_t run = n < TM_RUN_MAX ? (uint32_t)n : TM_RUN_MAX;
        error = file_write(file, page, run, bounce->pages);
        page += run;
        n -= run;
    }
    bounce_put(bounce);
    return error;
}

int file_zero(struct file *file, uint64_t page, uint64_t n, bool punch)
{
    size_t length = clamp(file, page * TM_PAGE, n * TM_PAGE);
    if (!length)
        return 0;
    int mode = punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    if (fallocate(file->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)(page * TM_PAGE), (off_t)length) ==
        0)
        return 0;
    return write_zeros(file, page, n);
}

/* One fdatasync, under file->lock but for the call itself. */
static void sync_now(struct file *file)
{
    uint64_t number = ++file->syncs_begun;
    pthread_mutex_unlock(&file->lock);
    if (fdatasync(file->fd) < 0)
        atomic_store(file->sync_failed, 1);
    pthread_mutex_lock(&file->lock);
    file->syncs_done = number;
    pthread_cond_broadcast(&file->synced);
}

int file_sync(struct file *file)
{
    pthread_mutex_lock(&file->lock);
    uint64_t needed =
        file->syncs_begun + 1; /* one that is under way may have missed what we wrote */
    while (file->syncs_done < needed && !file_is_doubtful(file)) {
        if (file->syncs_begun == file->syncs_done)
            sync_now(file);
        else
            pthread_cond_wait(&file->synced, &file->lock);
    }
    pthread_mutex_unlock(&file->lock);
    return file_is_doubtful(file) ? EIO : 0;
}
