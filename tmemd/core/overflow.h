/* SPDX-License-Identifier: BSD-3-Clause */
/* The store of a device whose server may go away, with a local file that takes what is written
 * meanwhile. A page is in one of the two: its bit in that file says in which. What lies in the file
 * is written back once the server can be reached. It is what others see of the core, as remote.h.
 */
#pragma once

#include <stdint.h>

struct overflow;
struct remote;
struct store;

/* The file: a page for whoever makes it, then a bit for each page of the device, from a page
 * boundary on the pages. It stays the caller's, as does the remote. 0 or an errno. */
int overflow_new(struct remote *remote, int fd, uint64_t pages, struct overflow **overflow);
/* The caller has ended all other calls. */
void overflow_free(struct overflow *overflow);
/* For tm_config. */
struct store *overflow_store(struct overflow *overflow);

/* Bytes that such a file has. */
uint64_t overflow_file_bytes(uint64_t pages);
/* How many pages lie in it now. */
uint64_t overflow_count(const struct overflow *overflow);
/* Write some of them back: 0 or an errno. */
int overflow_write_back(struct overflow *overflow);
