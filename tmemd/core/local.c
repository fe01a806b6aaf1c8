/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "local.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Drop the page cache after this many bytes written. */
#define DROP_EVERY (UINT64_C(8) << 20)

static struct local *local_of(struct store *store) { return (struct local *)store; }

/* Have every write to the file noticed, as far as the user may have more of inotify: those through
 * a mapping when whoever could write closes it. */
static int watch(struct local *local)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", local->fd);
    local->notices = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (local->notices >= 0 &&
        inotify_add_watch(local->notices, path, IN_MODIFY | IN_CLOSE_WRITE) < 0) {
        close(local->notices);
        local->notices = -1;
    }
    return fstat(local->fd, &local->opened) < 0 ? errno : 0;
}

static bool is_same_time(struct timespec one, struct timespec other)
{
    return one.tv_sec == other.tv_sec && one.tv_nsec == other.tv_nsec;
}

/* Whoever writes to a file changes its times first (Linux: generic_file_write_iter). Who renames or
 * replaces it changes st_ctim alone, and so does, at last, who writes to it and sets st_mtim back:
 * of that there is a notice. The times of a block device say nothing. */
static bool has_changed(const struct local *local)
{
    const struct stat *then = &local->opened;
    struct stat now;
    int notices;
    if (fstat(local->fd, &now) < 0 || now.st_size != then->st_size)
        return true;
    if (!S_ISREG(now.st_mode))
        return false;
    if (!is_same_time(now.st_mtim, then->st_mtim))
        return true;
    return !is_same_time(now.st_ctim, then->st_ctim) &&
           (ioctl(local->notices, FIONREAD, &notices) < 0 || notices > 0);
}

static int local_read(struct store *store, uint64_t offset, size_t length, void *buffer)
{
    struct local *local = local_of(store);
    size_t done = 0;
    while (done < length) {
        ssize_t got =
            pread(local->fd, (uint8_t *)buffer + done, length - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return errno;
        if (got == 0)
            return EIO; /* shorter than it was: somebody truncated it */
        done += (size_t)got;
    }
    if (local->immutable && has_changed(local))
        return ESTALE; /* looked at after the read, for it may have changed during that */
    if (local->drop_cache)
        posix_fadvise(local->fd, (off_t)offset, (off_t)length, POSIX_FADV_DONTNEED);
    return 0;
}

static void drop_cache(struct local *local, uint64_t offset, uint64_t length)
{
    sync_file_range(local->fd, (off_t)offset, (off_t)length, SYNC_FILE_RANGE_WRITE);
    if (atomic_fetch_add(&local->undropped, length) + length < DROP_EVERY)
        return;
    atomic_store(&local->undropped, 0);
    posix_fadvise(local->fd, 0, 0, POSIX_FADV_DONTNEED);
}

static int local_write(struct store *store, uint64_t offset, size_t length, const void *buffer,
                       bool through)
{
    struct local *local = local_of(store);
    size_t done = 0;
    (void)through; /* the kernel is as old as we are, and forgets nothing: a sync covers it */
    while (done < length) {
        ssize_t put = pwrite(local->fd, (const uint8_t *)buffer + done, length - done,
                             (off_t)(offset + done));
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0)
            return put < 0 ? errno : EIO;
        done += (size_t)put;
    }
    if (local->drop_cache)
        drop_cache(local, offset, length);
    return 0;
}

static int local_zero(struct store *store, uint64_t offset, uint64_t length, bool punch,
                      bool through)
{
    int mode = punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
    (void)through;
    return fallocate(local_of(store)->fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                     (off_t)length) == 0
               ? 0
               : ENOTSUP;
}

static int local_sync(struct store *store)
{
    return fdatasync(local_of(store)->fd) < 0 ? errno : 0;
}

static const struct store_ops ops = {local_read, local_write, local_zero, local_sync, NULL};

int local_init(struct local *local, int fd, bool drop_cache, bool immutable)
{
    *local = (struct local){.store = {.ops = &ops},
                            .fd = fd,
                            .drop_cache = drop_cache,
                            .immutable = immutable,
                            .notices = -1};
    return immutable ? watch(local) : 0;
}

void local_destroy(struct local *local)
{
    if (local->immutable && local->notices >= 0)
        close(local->notices);
}
