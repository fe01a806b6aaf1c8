/* SPDX-License-Identifier: BSD-3-Clause */
/* LD_PRELOAD shim: records, in the order they happened, all changes and syncs of the files below
 * $RECORD_BELOW, and lets some of them fail or be the process's last.
 *
 * The record is appended to $RECORD_TO: for each operation a struct entry, then the file's path,
 * then its data. One lock is held over each operation and its entry, so that the order in the
 * record is one the disk may have seen. record_mark and record_found append entries of a driver's
 * own, for what was acknowledged and what was read. One operation that this shim does not know how
 * to replay ends the process.
 *
 * $RECORD_FAULTS says what goes wrong, as in "12f 13f 40b": operations count from 0, and 'b' is
 * SIGKILL before that operation, 'a' SIGKILL after it, 's' SIGKILL before the next sync, 'f'
 * failure with EIO. A write or a zeroing that fails has changed some of its sectors nevertheless.
 * With any faults threads cannot be started, so that the numbers mean the same each time; those
 * that serve one request after the other do no harm, and record_threads(1) lets them be.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum operation { MARK, WRITE, SYNC, TRUNCATE, PUNCH, ALLOCATE, FOUND, TORN, SYNC_FAILED, RENAME };
enum fault { NONE = 0, KILL_BEFORE = 'b', KILL_AFTER = 'a', KILL_AT_SYNC = 's', FAIL = 'f' };
enum { SECTOR = 512, STRETCH = 12 };

struct entry {
    uint32_t operation, path_length;
    uint64_t offset, length; /* MARK: number and errno; TRUNCATE: the new size in length; FOUND: the
                                page in offset; RENAME: the new path as data */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *record;
static atomic_int threads_allowed;
static bool kill_at_sync;

/* An operation on a file that is to be recorded, under the lock. */
struct recorded {
    char path[4096];
    bool is;
    enum fault fault;
    unsigned number;
};

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))

static void append(enum operation operation, const char *path, uint64_t offset, uint64_t length,
                   const void *data)
{
    struct entry entry = {operation, (uint32_t)strlen(path), offset, length};

    if (!record && !(record = fopen(getenv("RECORD_TO"), "abe")))
        abort();
    fwrite(&entry, sizeof entry, 1, record);
    fwrite(path, 1, entry.path_length, record);
    if (data)
        fwrite(data, 1, length, record);
}

static enum fault fault_of(unsigned number)
{
    const char *plan = getenv("RECORD_FAULTS");
    char *end;

    for (; plan && *plan; plan = end + 1 + (end[1] == ' ')) {
        unsigned long planned = strtoul(plan, &end, 10);
        if (end == plan)
            abort();
        if (planned == number)
            return (enum fault) * end;
    }
    return NONE;
}

static void die(void)
{
    if (record)
        fflush(record);
    raise(SIGKILL);
}

static struct recorded begin_at(const char *path)
{
    static unsigned count;
    struct recorded this = {.fault = NONE};
    const char *below = getenv("RECORD_BELOW");

    snprintf(this.path, sizeof this.path, "%s", path);
    pthread_mutex_lock(&lock);
    this.is = below && strncmp(this.path, below, strlen(below)) == 0;
    if (this.is)
        this.fault = fault_of(this.number = count++);
    if (this.fault == KILL_BEFORE)
        die();
    kill_at_sync |= this.fault == KILL_AT_SYNC;
    return this;
}

static struct recorded begin(int fd)
{
    char link[64], path[4096];

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = '\0';
    return begin_at(path);
}

static void end(const struct recorded *this, bool done, enum operation operation, off_t offset,
                off_t length, const void *data)
{
    if (this->is && done)
        append(operation, this->path, (uint64_t)offset, (uint64_t)length, data);
    if (this->fault == KILL_AFTER)
        die();
    pthread_mutex_unlock(&lock);
}

/* Write some stretches of sectors of it, zeros without data, and fail. */
static int tear(const struct recorded *this, int fd, const uint8_t *data, off_t offset,
                off_t length)
{
    static const uint8_t zeros[STRETCH * SECTOR];
    unsigned seed = this->number + (unsigned)(offset / SECTOR);
    bool is_written = rand_r(&seed) & 1;

    for (off_t at = offset, next; at < offset + length; at = next) {
        next = (at / SECTOR + 1 + rand_r(&seed) % STRETCH) * SECTOR;
        next = next < offset + length ? next : offset + length;
        const uint8_t *piece = data ? data + (at - offset) : zeros;
        if (is_written && REAL(pwrite)(fd, piece, (size_t)(next - at), at) == next - at)
            append(WRITE, this->path, (uint64_t)at, (uint64_t)(next - at), piece);
        is_written = !is_written;
    }
    end(this, true, TORN, offset, length, NULL);
    errno = EIO;
    return -1;
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    struct recorded this = begin(fd);

    if (this.fault == FAIL)
        return tear(&this, fd, data, offset, (off_t)length);
    ssize_t done = REAL(pwrite)(fd, data, length, offset);
    end(&this, done > 0, WRITE, offset, done, data);
    return done;
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
    __attribute__((alias("pwrite")));

static int synced(int fd, int (*call)(int))
{
    struct recorded this = begin(fd);

    if (this.is && kill_at_sync)
        die();
    if (this.fault == FAIL) {
        end(&this, true, SYNC_FAILED, 0, 0, NULL);
        errno = EIO;
        return -1;
    }
    int result = call(fd);
    end(&this, result == 0, SYNC, 0, 0, NULL);
    return result;
}

int fsync(int fd) { return synced(fd, REAL(fsync)); }
int fdatasync(int fd) { return synced(fd, REAL(fdatasync)); }

int ftruncate(int fd, off_t size)
{
    struct recorded this = begin(fd);
    int result = REAL(ftruncate)(fd, size);

    end(&this, result == 0, TRUNCATE, 0, size, NULL);
    return result;
}
int ftruncate64(int fd, off_t size) __attribute__((alias("ftruncate")));

static enum operation allocation(int mode)
{
    switch (mode & ~FALLOC_FL_KEEP_SIZE) {
    case 0:
        return ALLOCATE;
    case FALLOC_FL_PUNCH_HOLE:
    case FALLOC_FL_ZERO_RANGE:
        return PUNCH;
    default:
        abort();
    }
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    struct recorded this = begin(fd);

    if (this.fault == FAIL && allocation(mode) == PUNCH)
        return tear(&this, fd, NULL, offset, length);
    if (this.is && mode & FALLOC_FL_ZERO_RANGE) /* which tmpfs does not know */
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    int result = REAL(fallocate)(fd, mode, offset, length);
    end(&this, result == 0, this.is ? allocation(mode) : ALLOCATE, offset, length, NULL);
    return result;
}
int fallocate64(int fd, int mode, off_t offset, off_t length) __attribute__((alias("fallocate")));

int posix_fallocate(int fd, off_t offset, off_t length)
{
    struct recorded this = begin(fd);
    int result = REAL(posix_fallocate)(fd, offset, length);

    end(&this, result == 0, ALLOCATE, offset, length, NULL);
    return result;
}
int posix_fallocate64(int fd, off_t offset, off_t length) __attribute__((alias("posix_fallocate")));

int rename(const char *from, const char *to)
{
    struct recorded this = begin_at(from);
    int result = REAL(rename)(from, to);

    end(&this, result == 0, RENAME, 0, (off_t)strlen(to), to);
    return result;
}

/* What cannot be replayed: a write without an offset, and one of several pieces, which nobody has
 * needed so far. */
static void refuse(int fd)
{
    struct recorded this = begin(fd);

    if (this.is)
        abort();
    pthread_mutex_unlock(&lock);
}

ssize_t write(int fd, const void *data, size_t length)
{
    refuse(fd);
    return REAL(write)(fd, data, length);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset)
{
    refuse(fd);
    return REAL(pwritev)(fd, parts, count, offset);
}
ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t offset)
    __attribute__((alias("pwritev")));

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument)
{
    const char *plan = getenv("RECORD_FAULTS");
    bool refused = plan && *plan && !atomic_load(&threads_allowed);

    return refused ? EAGAIN : REAL(pthread_create)(thread, attributes, start, argument);
}

void record_threads(int allowed) { atomic_store(&threads_allowed, allowed); }

static void append_own(enum operation operation, uint64_t number, uint64_t length, const void *data)
{
    pthread_mutex_lock(&lock);
    append(operation, "", number, length, data);
    pthread_mutex_unlock(&lock);
}

void record_mark(uint64_t number, uint64_t error) { append_own(MARK, number, error, NULL); }
void record_found(uint64_t page, const void *data, uint64_t length)
{
    append_own(FOUND, page, length, data);
}
