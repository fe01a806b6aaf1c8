/* SPDX-License-Identifier: BSD-3-Clause */
/* LD_PRELOAD shim: a disk that does not answer. What is done to the file $GATED, or to one whose
 * name goes on with '.' after that (its map), is logged in $GATE.log, a line for each call: its
 * name, offset, length, and 1 if it was held up.
 *
 * While the file $GATE exists, calls wait. It may say which: the name of one call and a range of
 * bytes, 'pwrite 4096 8192', the end not included; '*' stands for every call. Empty: all. 'done'
 * stands for none, but holds up writes once they have been done. '!pwrite' and the like: these
 * calls fail with EIO instead; '!short': a read is of one page at most. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool is_gated(int fd)
{
    char link[64], path[PATH_MAX] = "";
    size_t length = strlen(getenv("GATED"));

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 &&
           strncmp(path, getenv("GATED"), length) == 0 &&
           (path[length] == '\0' || path[length] == '.');
}

static bool is_held(const char *call, off_t offset, size_t length)
{
    char wanted[16] = "*";
    long long first = 0, end = LLONG_MAX;
    FILE *gate = fopen(getenv("GATE"), "re");

    if (!gate)
        return false;
    if (fscanf(gate, "%15s %lld %lld", wanted, &first, &end) < 0)
        clearerr(gate);
    fclose(gate);
    bool is_meant = strcmp(wanted, call) == 0 || (strcmp(wanted, "*") == 0 && *call != '!');
    return is_meant && offset < end && (offset >= first || offset + (long long)length > first);
}

static bool is_named(const char *call)
{
    char wanted[16] = "";
    FILE *gate = fopen(getenv("GATE"), "re");
    if (gate && fscanf(gate, "%15s", wanted) < 0)
        clearerr(gate);
    if (gate)
        fclose(gate);
    return strcmp(wanted, call) == 0;
}

static void note(const char *call, off_t offset, size_t length, bool held)
{
    char path[PATH_MAX], line[128];
    snprintf(path, sizeof path, "%s.log", getenv("GATE"));
    int fd = open(path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
    int n = snprintf(line, sizeof line, "%s %lld %zu %d\n", call, (long long)offset, length, held);
    if (fd < 0 || write(fd, line, (size_t)n) != n)
        abort();
    close(fd);
}

static void pass(int fd, const char *call, off_t offset, size_t length)
{
    if (!is_gated(fd))
        return;
    bool held = is_held(call, offset, length);
    note(call, offset, length, held);
    while (held) {
        usleep(1000);
        held = is_held(call, offset, length);
    }
}

/* Whether the call, by its name with '!', is to fail. */
static bool fails(int fd, const char *call, off_t offset, size_t length)
{
    if (!is_gated(fd) || !is_held(call, offset, length))
        return false;
    errno = EIO;
    return true;
}

static void stay(int fd, off_t offset, size_t length)
{
    if (is_gated(fd) && is_named("done"))
        pass(fd, "done", offset, length);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    pass(fd, "pwrite", offset, length);
    if (fails(fd, "!pwrite", offset, length))
        return -1;
    ssize_t put = REAL(pwrite)(fd, data, length, offset);
    stay(fd, offset, length);
    return put;
}

ssize_t pread(int fd, void *data, size_t length, off_t offset)
{
    pass(fd, "pread", offset, length);
    if (fails(fd, "!pread", offset, length))
        return -1;
    if (fails(fd, "!short", offset, length) && length > 4096)
        length = 4096;
    return REAL(pread)(fd, data, length, offset);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    pass(fd, "fallocate", offset, (size_t)length);
    if (fails(fd, "!fallocate", offset, (size_t)length))
        return -1;
    int result = REAL(fallocate)(fd, mode, offset, length);
    stay(fd, offset, (size_t)length);
    return result;
}

int fdatasync(int fd)
{
    pass(fd, "fdatasync", 0, 0);
    if (fails(fd, "!fdatasync", 0, 0))
        return -1;
    return REAL(fdatasync)(fd);
}

int fsync(int fd)
{
    pass(fd, "fdatasync", 0, 0);
    return REAL(fsync)(fd);
}
