/* SPDX-License-Identifier: BSD-3-Clause */
/* What every part needs: an end with a message, the time, a connection. */
#pragma once

#include <stdint.h>

_Noreturn void die(const char *what, const char *why);
uint64_t now(void);               /* CLOCK_MONOTONIC, ns */
void *allocate(uint64_t bytes);   /* zeroed */
int connect_to(const char *path); /* to a unix socket; -1 and errno */
