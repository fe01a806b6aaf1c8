/* SPDX-License-Identifier: BSD-3-Clause */
/* Threads of the core's own. No lock. */
#pragma once

#include <pthread.h>
#include <stdbool.h>

enum { THREAD_STACK = 256 << 10 };

/* Start one with a small stack: where all memory is locked a stack is taken whole. */
static inline bool thread_start(pthread_t *thread, void *(*work)(void *), void *argument)
{
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, THREAD_STACK);
    bool started = pthread_create(thread, &small, work, argument) == 0;
    pthread_attr_destroy(&small);
    return started;
}
