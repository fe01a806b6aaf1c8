/* SPDX-License-Identifier: BSD-3-Clause */
/* A file that is truncated while mapped makes the next touch a SIGBUS. Of a pool there is no page
 * to go on with: say which it was and end the process. Memory of others becomes zeros
 * (tm_watch_mapping). Other faults go to the handler before. One mutex, which the handler does not
 * take. */
#pragma once

#include <stdint.h>

/* Watch a mapping; `name` must stay until it is forgotten. Returns 0 or an errno. */
int sigbus_watch(const void *base, uint64_t bytes, const char *name);
void sigbus_forget(const void *base);
