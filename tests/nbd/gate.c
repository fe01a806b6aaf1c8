/* LD_PRELOAD shim: while the file $GATE exists, writes to the file $GATED wait; the first to do so makes $GATE.reached. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int is_gated(int fd)
{
    char link[64], path[PATH_MAX] = "";

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 && strcmp(path, getenv("GATED")) == 0;
}

static void pass_gate(void)
{
    const char *gate = getenv("GATE");
    char reached[PATH_MAX];

    snprintf(reached, sizeof reached, "%s.reached", gate);
    while (access(gate, F_OK) == 0) {
        close(open(reached, O_CREAT | O_WRONLY, 0600));
        usleep(1000);
    }
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, "pwrite");

    if (is_gated(fd))
        pass_gate();
    return real(fd, data, length, offset);
}
