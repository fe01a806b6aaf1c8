/* SPDX-License-Identifier: BSD-3-Clause */
/* An NBD server that has a file of ours, and a device's remote with an overflow file for it. */
#pragma once

#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fixture.h"
#include "overflow.h"
#include "remote.h"

extern char **environ;
static char socket_path[PATH_MAX], disk_path[PATH_MAX];
static struct remote *remote;
static struct overflow *overflow;

static pid_t start_server(void)
{
    char *words[] = {"nbdkit", "-f", "-U", socket_path, "file", disk_path, NULL};
    pid_t pid;
    unlink(socket_path);
    CHECK(posix_spawnp(&pid, words[0], NULL, NULL, words, environ) == 0);
    while (access(socket_path, F_OK) != 0)
        usleep(1000);
    return pid;
}

static void end_server(pid_t pid)
{
    CHECK(kill(pid, SIGKILL) == 0 && waitpid(pid, NULL, 0) == pid);
}

/* In a directory, for so many pages; the server is away then. */
static void open_all(const char *directory, uint64_t pages)
{
    char uri[PATH_MAX + 32], why[REMOTE_WHY], path[PATH_MAX + 16];
    snprintf(socket_path, sizeof socket_path, "%s/sock", directory);
    snprintf(disk_path, sizeof disk_path, "%s/disk", directory);
    snprintf(path, sizeof path, "%s/overflow", directory);
    snprintf(uri, sizeof uri, "nbd+unix:///?socket=%s", socket_path);
    int disk = open(disk_path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(disk >= 0 && ftruncate(disk, (off_t)(pages * TM_PAGE)) == 0 && close(disk) == 0);
    CHECK(remote_new(&(struct remote_config){.uri = uri, .connections = 3, .timeout_ms = 120000},
                     &remote) == 0);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)overflow_file_bytes(pages)) == 0);
    pid_t server = start_server();
    while (remote_connect(remote, why, sizeof why) != 0)
        usleep(1000); /* it is bound, and does not listen yet */
    end_server(server);
    CHECK(overflow_new(remote, fd, pages, &overflow) == 0);
}
