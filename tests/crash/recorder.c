/* SPDX-License-Identifier: BSD-3-Clause */
/* LD_PRELOAD shim: records, in the order they happened, all changes and syncs of the files below
 * $RECORD_BELOW, and lets some of them fail or be the process's last.
 *
 * The record is appended to $RECORD_TO, by all processes that have the shim: for each operation a
 * struct entry, then the file's path, then its data. One lock is held over each operation and its
 * entry, so that the order in the record is one the disk may have seen. What changes in a mapping
 * counts as written before the next operation. record_mark and record_found append entries of a
 * driver's own, for what was acknowledged and what was read. One operation that this shim does not
 * know how to replay ends the process.
 *
 * $RECORD_FAULTS says what goes wrong, as in "12f 13f 40b": operations count from 0, and 'b' is
 * SIGKILL before that operation, 'a' SIGKILL after it, 's' SIGKILL before the next sync, 'f'
 * failure with EIO, 'e' that of the next sync. A write or a zeroing that fails has changed some of
 * its sectors nevertheless. What is sent on a socket is an operation, too: 'c' sends half of it and
 * cuts the connection. An upper case letter makes the file $RECORD_AWAY first; 'H' that, and stops
 * all operations for as long as it is there. 'l' makes $RECORD_AWAY.late, and holds the next change
 * back for as long.
 *
 * While $RECORD_FULL is there nothing gets blocks that has none.
 *
 * With any faults threads cannot be started, so that the numbers mean the same each time; those
 * that serve one request after the other do no harm, and record_threads(1) or $RECORD_THREADS lets
 * them be. With $RECORD_AWAY the monotonic clock is fast, and while that is there very fast, so
 * that time-outs can be long and are not waited for. */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum operation {
    MARK,
    WRITE,
    SYNC,
    TRUNCATE,
    PUNCH,
    ALLOCATE,
    FOUND,
    TORN,
    SYNC_FAILED,
    RENAME,
    SENT,
    AWAY,
    BACK, /* this and the next are not ours */
    FORGOT,
    HELD,
    LATE,
};
enum fault {
    NONE = 0,
    KILL_BEFORE = 'b',
    KILL_AFTER = 'a',
    KILL_AT_SYNC = 's',
    FAIL = 'f',
    FAIL_AT_SYNC = 'e',
    CUT = 'c',
    HANG = 'h',
    LATE_CHANGE = 'l'
};
enum { SECTOR = 512, STRETCH = 12, FAST = 4, VERY_FAST = 400, SLICE_MS = 5 };

struct entry {
    uint32_t operation, path_length;
    uint64_t offset, length; /* MARK: number and errno; TRUNCATE: the new size in length; FOUND: the
                                page in offset; RENAME: the new path as data */
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *record;
static atomic_int threads_allowed;
static atomic_bool hung;
static bool kill_at_sync, fail_at_sync, late_change, sync_failed;

/* The one file that is mapped to be changed, and what is recorded of it. */
static struct {
    char path[4096];
    const uint8_t *bytes;
    uint8_t *recorded;
    size_t length;
    off_t offset;
} mapping;

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
    fflush(record); /* the next entry may be another process's */
}

/* Whoever is told of a failed sync notes it a moment later. To be killed by another thread before
 * is what nobody can mend (docs/decisions/0008-what-the-file-holds.md). */
static void die(void)
{
    if (sync_failed)
        usleep(10000);
    raise(SIGKILL);
}

/* Have the record for ourselves, up to date. */
static void lock_record(void)
{
    pthread_mutex_lock(&lock);
    if (!record && !(record = fopen(getenv("RECORD_TO"), "abe")))
        abort();
    while (flock(fileno(record), LOCK_EX) < 0)
        ;
    for (size_t at = 0; at < mapping.length; at += SECTOR)
        if (memcmp(mapping.recorded + at, mapping.bytes + at, SECTOR) != 0) {
            memcpy(mapping.recorded + at, mapping.bytes + at, SECTOR);
            append(WRITE, mapping.path, (uint64_t)mapping.offset + at, SECTOR,
                   mapping.recorded + at);
        }
}

static void unlock_record(void)
{
    flock(fileno(record), LOCK_UN);
    pthread_mutex_unlock(&lock);
}

static bool is_away(void)
{
    const char *path = getenv("RECORD_AWAY");
    return path && access(path, F_OK) == 0;
}

/* Under the lock. */
static void go_away(void)
{
    const char *path = getenv("RECORD_AWAY");
    int fd = path ? open(path, O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd < 0)
        abort();
    close(fd);
    append(AWAY, "", 0, 0, NULL);
}

static int fault_of(unsigned number)
{
    const char *plan = getenv("RECORD_FAULTS");
    char *end;

    for (; plan && *plan; plan = end + 1 + (end[1] == ' ')) {
        unsigned long planned = strtoul(plan, &end, 10);
        if (end == plan)
            abort();
        if (planned == number)
            return *end;
    }
    return NONE;
}

static void hang(void)
{
    while (atomic_load(&hung) && is_away())
        usleep(5000);
    atomic_store(&hung, false);
}

/* An operation begins, with the lock. */
static void count(struct recorded *this)
{
    static unsigned operations;

    hang();
    lock_record();
    this->number = operations++;
    int fault = fault_of(this->number);
    if (isupper(fault))
        go_away();
    this->fault = (enum fault)tolower(fault);
    if (this->fault == KILL_BEFORE)
        die();
    kill_at_sync |= this->fault == KILL_AT_SYNC;
    fail_at_sync |= this->fault == FAIL_AT_SYNC;
    late_change |= this->fault == LATE_CHANGE;
    if (this->fault != HANG)
        return;
    atomic_store(&hung, true);
    unlock_record();
    hang();
    lock_record();
}

static bool is_below(const char *path)
{
    const char *below = getenv("RECORD_BELOW");
    return below && strncmp(path, below, strlen(below)) == 0;
}

static struct recorded begin_at(const char *path)
{
    struct recorded this = {.is = is_below(path)};

    snprintf(this.path, sizeof this.path, "%s", path);
    if (this.is)
        count(&this);
    return this;
}

static void path_of(int fd, char *path, size_t size)
{
    char link[64];

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    path[length < 0 ? 0 : length] = '\0';
}

static struct recorded begin(int fd)
{
    char path[4096];

    path_of(fd, path, sizeof path);
    return begin_at(path);
}

static void end(const struct recorded *this, bool done, enum operation operation, off_t offset,
                off_t length, const void *data)
{
    if (!this->is)
        return;
    if (done)
        append(operation, this->path, (uint64_t)offset, (uint64_t)length, data);
    if (this->fault == KILL_AFTER)
        die();
    unlock_record();
}

/* A change waits, if it is to be late, and what comes after it goes ahead. */
static void be_late(const struct recorded *this)
{
    char path[4096];

    if (!this->is || !late_change)
        return;
    late_change = false;
    snprintf(path, sizeof path, "%s.late", getenv("RECORD_AWAY"));
    int fd = open(path, O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return; /* one at a time */
    close(fd);
    append(HELD, this->path, 0, 0, NULL);
    unlock_record();
    while (access(path, F_OK) == 0)
        usleep(5000);
    lock_record();
    append(LATE, this->path, 0, 0, NULL);
}

/* Of a full disk, on which only what has blocks can be written. */
static ssize_t write_blocks(int fd, const void *data, size_t length, off_t offset)
{
    const char *full = getenv("RECORD_FULL");
    bool is_full = full && access(full, F_OK) == 0;
    off_t hole = is_full ? lseek(fd, offset, SEEK_HOLE) : -1;

    if (!is_full || hole >= offset + (off_t)length)
        return REAL(pwrite)(fd, data, length, offset);
    errno = ENOSPC;
    return hole > offset ? REAL(pwrite)(fd, data, (size_t)(hole - offset), offset) : -1;
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
    be_late(&this);
    ssize_t done = (this.is ? write_blocks : REAL(pwrite))(fd, data, length, offset);
    int error = errno;
    end(&this, done > 0, WRITE, offset, done, data);
    errno = error;
    return done;
}
ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
    __attribute__((alias("pwrite")));

static int synced(int fd, int (*call)(int))
{
    struct recorded this = begin(fd);

    if (this.is && kill_at_sync)
        die();
    if (this.is && (this.fault == FAIL || fail_at_sync)) {
        fail_at_sync = false;
        sync_failed = true;
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
    be_late(&this);
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

/* Between a driver and a server. It may have to wait for the other, so it does without the lock. */
ssize_t send(int fd, const void *data, size_t length, int flags)
{
    struct recorded this = {.is = false};

    if (getenv("RECORD_TO")) {
        count(&this);
        append(SENT, program_invocation_short_name, 0, 0, NULL);
        unlock_record();
    }
    ssize_t done = REAL(send)(fd, data, this.fault == CUT ? length / 2 : length, flags);
    if (this.fault == KILL_AFTER)
        die();
    if (this.fault != CUT)
        return done;
    shutdown(fd, SHUT_RDWR);
    return (ssize_t)length;
}

void *mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    char path[4096] = "";
    void *bytes = REAL(mmap)(at, length, protection, flags, fd, offset);

    if (fd >= 0 && flags & MAP_SHARED && protection & PROT_WRITE)
        path_of(fd, path, sizeof path);
    if (bytes == MAP_FAILED || !*path || !is_below(path))
        return bytes;
    if (mapping.length)
        abort();
    memcpy(mapping.path, path, sizeof path);
    mapping.recorded = malloc(length);
    memcpy(mapping.recorded, bytes, length);
    mapping.bytes = bytes;
    mapping.offset = offset;
    mapping.length = length;
    return bytes;
}
void *mmap64(void *at, size_t length, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

int munmap(void *bytes, size_t length)
{
    if (bytes && bytes == mapping.bytes) {
        lock_record();
        mapping.length = 0;
        mapping.bytes = NULL;
        free(mapping.recorded);
        unlock_record();
    }
    return REAL(munmap)(bytes, length);
}

/* Of a clock that is fast: nanoseconds. */
static int64_t fast_now(void)
{
    static pthread_mutex_t clock = PTHREAD_MUTEX_INITIALIZER;
    static int64_t then, fast;
    struct timespec real;

    REAL(clock_gettime)(CLOCK_MONOTONIC, &real);
    int64_t now = (int64_t)real.tv_sec * 1000000000 + real.tv_nsec;
    pthread_mutex_lock(&clock);
    fast += then ? (now - then) * (is_away() ? VERY_FAST : FAST) : now;
    then = now;
    now = fast;
    pthread_mutex_unlock(&clock);
    return now;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    if (id != CLOCK_MONOTONIC || !getenv("RECORD_AWAY"))
        return REAL(clock_gettime)(id, now);
    int64_t fast = fast_now();
    *now = (struct timespec){.tv_sec = fast / 1000000000, .tv_nsec = fast % 1000000000};
    return 0;
}

/* Of the core's connections, which look at the clock again, each second at least. */
int poll(struct pollfd *fds, nfds_t n, int timeout)
{
    bool shorter = n == 2 && timeout > SLICE_MS && timeout <= 1000 && getenv("RECORD_AWAY");
    return REAL(poll)(fds, n, shorter ? SLICE_MS : timeout);
}

/* Of those whose clock is the monotonic one, which is what the core has. */
int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                           const struct timespec *until)
{
    int64_t deadline = (int64_t)until->tv_sec * 1000000000 + until->tv_nsec;
    struct timespec soon;

    if (!getenv("RECORD_AWAY"))
        return pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, until);
    if (fast_now() >= deadline)
        return ETIMEDOUT;
    REAL(clock_gettime)(CLOCK_MONOTONIC, &soon);
    soon.tv_nsec += SLICE_MS * 1000000;
    soon.tv_sec += soon.tv_nsec / 1000000000;
    soon.tv_nsec %= 1000000000;
    pthread_cond_clockwait(cond, mutex, CLOCK_MONOTONIC, &soon);
    return 0; /* woken, or for nothing */
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                   void *argument)
{
    const char *plan = getenv("RECORD_FAULTS");
    bool refused = plan && *plan && !getenv("RECORD_THREADS") && !atomic_load(&threads_allowed);

    return refused ? EAGAIN : REAL(pthread_create)(thread, attributes, start, argument);
}

void record_threads(int allowed) { atomic_store(&threads_allowed, allowed); }

static void append_own(enum operation operation, uint64_t number, uint64_t length, const void *data)
{
    lock_record();
    append(operation, "", number, length, data);
    unlock_record();
}

void record_mark(uint64_t number, uint64_t error) { append_own(MARK, number, error, NULL); }
void record_found(uint64_t page, const void *data, uint64_t length)
{
    append_own(FOUND, page, length, data);
}
