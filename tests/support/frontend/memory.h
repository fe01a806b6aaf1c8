/* SPDX-License-Identifier: BSD-3-Clause */
/* The memory of a guest that does not exist: one memfd that the server may map. */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct memory {
    int fd;
    uint8_t *base;
    size_t size, used;
};

void memory_open(struct memory *memory, size_t size);
/* Zeroed, aligned to 4 KiB; there is no giving back. */
void *memory_take(struct memory *memory, size_t bytes);
/* Where the server finds what lies at `pointer`. Guest physical addresses begin off zero, so that
 * nobody takes one kind of address for another. */
#define GUEST_BASE UINT64_C(0x100000000)
uint64_t guest_address(const struct memory *memory, const void *pointer);
