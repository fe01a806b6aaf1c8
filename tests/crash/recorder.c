/* LD_PRELOAD shim: records, in the order they happened, all changes and syncs of the files below $RECORD_BELOW.
 *
 * The record goes to $RECORD_TO: for each operation a struct entry, then the file's path, then the data written. One lock is held
 * over each operation and its entry, so that the order in the record is one the disk may have seen. record_mark(n)
 * appends an entry of its own, for a driver to say what has been acknowledged. Operations that failed are not recorded;
 * one that this shim does not know how to replay ends the process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { MARK, WRITE, SYNC, TRUNCATE, PUNCH, ALLOCATE };

struct entry {
    uint32_t operation, path_length;
    uint64_t offset, length; /* MARK: the number in offset; TRUNCATE: the new size in length */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *record;

static void append(enum operation operation, const char *path, uint64_t offset, uint64_t length)
{
    struct entry entry = {operation, (uint32_t)strlen(path), offset, length};

    if (!record && !(record = fopen(getenv("RECORD_TO"), "wbe")))
        abort();
    fwrite(&entry, sizeof entry, 1, record);
    fwrite(path, 1, entry.path_length, record);
}

/* The path behind fd, when it is one to record. */
static bool recorded(int fd, char path[4096])
{
    const char *below = getenv("RECORD_BELOW");
    char link[64];

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, 4095);
    path[length < 0 ? 0 : length] = '\0';
    return below && strncmp(path, below, strlen(below)) == 0;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static ssize_t write_at(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    char path[4096];
    bool record_it = recorded(fd, path);

    pthread_mutex_lock(&lock);
    ssize_t done = REAL(pwritev2)(fd, parts, count, offset, flags);
    if (record_it && done > 0) {
        size_t left = (size_t)done;
        append(WRITE, path, (uint64_t)offset, left);
        for (const struct iovec *part = parts; left; part++) {
            size_t some = part->iov_len < left ? part->iov_len : left;
            fwrite(part->iov_base, 1, some, record);
            left -= some;
        }
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t pwritev2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
{
    return write_at(fd, parts, count, offset, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int count, off_t offset, int flags)
    __attribute__((alias("pwritev2")));

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    return write_at(fd, parts, count, offset, 0);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset) __attribute__((alias("pwritev")));

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    struct iovec part = {(void *)(uintptr_t)data, length};
    return write_at(fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset) __attribute__((alias("pwrite")));

static int synced(int fd, int (*call)(int))
{
    char path[4096];
    bool record_it = recorded(fd, path);

    pthread_mutex_lock(&lock);
    int result = call(fd);
    if (record_it && result == 0)
        append(SYNC, path, 0, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

int ftruncate(int fd, off_t size)
{
    char path[4096];
    bool record_it = recorded(fd, path);

    pthread_mutex_lock(&lock);
    int result = REAL(ftruncate)(fd, size);
    if (record_it && result == 0)
        append(TRUNCATE, path, 0, (uint64_t)size);
    pthread_mutex_unlock(&lock);
    return result;
}
int ftruncate64(int fd, off_t size) __attribute__((alias("ftruncate")));

static enum operation allocation(int mode)
{
    switch (mode & ~FALLOC_FL_KEEP_SIZE) {
    case 0: return ALLOCATE;
    case FALLOC_FL_PUNCH_HOLE:
    case FALLOC_FL_ZERO_RANGE: return PUNCH;
    default: abort();
    }
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    char path[4096];
    bool record_it = recorded(fd, path);

    pthread_mutex_lock(&lock);
    int result = REAL(fallocate)(fd, mode, offset, length);
    if (record_it && result == 0)
        append(allocation(mode), path, (uint64_t)offset, (uint64_t)length);
    pthread_mutex_unlock(&lock);
    return result;
}
int fallocate64(int fd, int mode, off_t offset, off_t length) __attribute__((alias("fallocate")));

int posix_fallocate(int fd, off_t offset, off_t length)
{
    char path[4096];
    bool record_it = recorded(fd, path);

    pthread_mutex_lock(&lock);
    int result = REAL(posix_fallocate)(fd, offset, length);
    if (record_it && result == 0)
        append(ALLOCATE, path, (uint64_t)offset, (uint64_t)length);
    pthread_mutex_unlock(&lock);
    return result;
}
int posix_fallocate64(int fd, off_t offset, off_t length) __attribute__((alias("posix_fallocate")));

ssize_t write(int fd, const void *data, size_t length)
{
    char path[4096];

    if (recorded(fd, path))
        abort(); /* a write without an offset cannot be replayed */
    return REAL(write)(fd, data, length);
}

void record_mark(uint64_t number)
{
    pthread_mutex_lock(&lock);
    append(MARK, "", number, 0);
    fflush(record);
    pthread_mutex_unlock(&lock);
}
