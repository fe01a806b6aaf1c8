/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "sigbus.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tmem.h"

/* The handler can only be given what is global. Mappings are emptied, not freed: it may look. */
enum { MAPPINGS = 1024 };

static struct {
    _Atomic uintptr_t base;
    _Atomic uint64_t bytes;
    _Atomic(const char *) name;
    _Atomic(_Atomic bool *) lost;
} mappings[MAPPINGS];

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool installed;
static struct sigaction previous;

static void say(const char *text)
{
    ssize_t ignored = write(STDERR_FILENO, text, strlen(text));
    (void)ignored;
}

/* Put zeros where the memory was. False: it cannot be done. */
static bool replace(uintptr_t base, uint64_t bytes, _Atomic bool *lost)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    atomic_store(lost, true);
    return mmap((void *)base, bytes, PROT_READ | PROT_WRITE, flags, -1, 0) != MAP_FAILED;
}

static void stop(const char *name)
{
    say("tmem: ");
    say(name);
    say(": the pool file was truncated while in use, or its tmpfs is damaged; stopping\n");
    _exit(1);
}

static void handle(int signal, siginfo_t *info, void *context)
{
    uintptr_t address = (uintptr_t)info->si_addr;
    for (int i = 0; i < MAPPINGS; i++) {
        uintptr_t base = atomic_load(&mappings[i].base);
        uint64_t bytes = atomic_load(&mappings[i].bytes);
        if (!base || address < base || address - base >= bytes)
            continue;
        _Atomic bool *lost = atomic_load(&mappings[i].lost);
        if (atomic_load(&mappings[i].base) != base)
            continue; /* forgotten meanwhile: what was read may be of two mappings */
        if (lost && replace(base, bytes, lost))
            return;
        stop(atomic_load(&mappings[i].name));
    }
    if (previous.sa_flags & SA_SIGINFO)
        previous.sa_sigaction(signal, info, context);
    else
        sigaction(signal, &previous, NULL); /* the fault comes again and takes its default course */
}

static int install(void)
{
    struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_NODEFER};
    if (!installed && sigaction(SIGBUS, &action, &previous) < 0)
        return errno;
    installed = true;
    return 0;
}

static int watch(const void *base, uint64_t bytes, const char *name, _Atomic bool *lost)
{
    pthread_mutex_lock(&lock);
    int error = install(), i = 0;
    while (i < MAPPINGS && atomic_load(&mappings[i].base))
        i++;
    if (!error && i == MAPPINGS)
        error = EMFILE;
    if (!error) {
        atomic_store(&mappings[i].name, name);
        atomic_store(&mappings[i].lost, lost);
        atomic_store(&mappings[i].bytes, bytes);
        atomic_store(&mappings[i].base, (uintptr_t)base);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

int sigbus_watch(const void *base, uint64_t bytes, const char *name)
{
    return watch(base, bytes, name, NULL);
}

int tm_watch_mapping(void *base, uint64_t bytes, _Atomic bool *lost)
{
    return watch(base, bytes, "shared memory", lost);
}

void tm_forget_mapping(void *base) { sigbus_forget(base); }

void sigbus_forget(const void *base)
{
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MAPPINGS; i++)
        if (atomic_load(&mappings[i].base) == (uintptr_t)base)
            atomic_store(&mappings[i].base, 0);
    pthread_mutex_unlock(&lock);
}
