/* SPDX-License-Identifier: BSD-3-Clause */
/* Static probes (USDT), for bpftrace, perf and systemtap: nothing but a nop until somebody looks.
 * docs/architecture.md has a line that uses them. Arguments: device, page, result. */
#pragma once

#include <sys/sdt.h>

#define PROBE(name, device, page, result) DTRACE_PROBE3(tmem, name, device, page, result)
