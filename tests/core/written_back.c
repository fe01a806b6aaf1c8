/* SPDX-License-Identifier: BSD-3-Clause */
/* A page is written back from the overflow file: no newer one reaches the server before that is
 * durable, and where that fails newer ones go to the overflow file, too. In the directory that is
 * given; exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sys/syscall.h>

#include "locks.h"
#include "server.h"
#include "store.h"

enum { PAGES = 8 };

static _Atomic bool syncs_fail, waits, written;
static void (*during_sync)(void);
static pthread_t writer;

int fdatasync(int fd)
{
    void (*meanwhile)(void) = during_sync;
    during_sync = NULL;
    if (meanwhile)
        meanwhile();
    errno = EIO;
    return syncs_fail ? -1 : (int)syscall(SYS_fdatasync, fd);
}

void __real_lock_io(struct locks *locks, struct io_range *io);
void __wrap_lock_io(struct locks *locks, struct io_range *io)
{
    atomic_store(&waits, true);
    __real_lock_io(locks, io);
}

static int write_page(uint8_t version, bool through)
{
    uint8_t content[TM_PAGE];
    struct store *store = overflow_store(overflow);
    memset(content, version, sizeof content);
    return store->ops->write(store, 0, sizeof content, content, through);
}

static uint8_t version_at_server(void)
{
    uint8_t content[TM_PAGE];
    CHECK(remote_read(remote, 0, sizeof content, content) == 0);
    return content[0];
}

static void be_there(void)
{
    while (remote_is_away(remote)) {
        remote_look_after(remote);
        usleep(1000);
    }
}

static void be_away(pid_t server)
{
    end_server(server);
    while (!remote_is_away(remote))
        remote_look_after(remote);
}

static void *write_newer(void *unused)
{
    (void)unused;
    CHECK(write_page(2, true) == 0);
    atomic_store(&written, true);
    return NULL;
}

static void begin_to_write_newer(void)
{
    atomic_store(&waits, false);
    CHECK(pthread_create(&writer, NULL, write_newer, NULL) == 0);
    while (!atomic_load(&waits) && !atomic_load(&written))
        usleep(100);
    CHECK(!atomic_load(&written));
}

static pid_t test_a_newer_page_waits_until_the_older_one_is_durably_gone(void)
{
    CHECK(write_page(1, true) == 0 && overflow_count(overflow) == 1);
    pid_t server = start_server();
    be_there();
    during_sync = begin_to_write_newer;
    CHECK(overflow_write_back(overflow) == 0);
    pthread_join(writer, NULL);
    CHECK(overflow_count(overflow) == 0 && version_at_server() == 2);
    return server;
}

static void test_what_cannot_be_durably_gone_is_here(pid_t server)
{
    struct store *store = overflow_store(overflow);
    be_away(server);
    CHECK(write_page(3, true) == 0);
    server = start_server();
    be_there();
    syncs_fail = true;
    CHECK(overflow_write_back(overflow) == EIO);
    syncs_fail = false;
    CHECK(overflow_count(overflow) == 1 && version_at_server() == 3);
    CHECK(write_page(4, false) == 0 && version_at_server() == 3);
    CHECK(write_page(5, true) == EIO && store->ops->sync(store) == EIO);
    CHECK(overflow_write_back(overflow) == 0);
    CHECK(overflow_count(overflow) == 0 && version_at_server() == 4);
    CHECK(write_page(5, true) == 0 && version_at_server() == 5);
    end_server(server);
}

int main(int argc, char **argv)
{
    CHECK(argc == 2);
    open_all(argv[1], PAGES);
    test_what_cannot_be_durably_gone_is_here(
        test_a_newer_page_waits_until_the_older_one_is_durably_gone());
    overflow_free(overflow);
    remote_free(remote);
    puts("ok");
    return 0;
}
