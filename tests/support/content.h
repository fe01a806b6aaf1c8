/* SPDX-License-Identifier: BSD-3-Clause */
/* Page contents that tell where they belong: a page and a version always give the same 4096 bytes,
 * as content.py's do, but cheap enough to keep ahead of a device. */
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { PAGE = 4096, WORDS = PAGE / 8 };

/* splitmix64: every seed gives an unrelated stream. */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* Records as heaps have them: a pointer, a counter, a tag, padding. LZ4 makes a quarter of such a
 * page. */
static inline void fill_heap(uint64_t *words, uint64_t state)
{
    uint64_t heap = UINT64_C(0x00007f0000000000) | (next_random(&state) & 0xfffff0000);
    uint64_t count = next_random(&state) & 0xffffff;

    for (int i = 0; i < WORDS; i += 4) {
        uint64_t random = next_random(&state);
        words[i] = heap | (random & 0xfff0);
        words[i + 1] = random >> 60 ? count : ++count;
        words[i + 2] = (random >> 16 & 7) ? 1 : random >> 48;
        words[i + 3] = 0;
    }
}

/*
 * What page number `page` holds in its version `version`. Of sixteen pages, one is zeros, two are
 * incompressible, one repeats a word; LZ4 makes a third of all of them together.
 */
static inline void fill_page(uint64_t *words, size_t page, uint32_t version)
{
    uint64_t state = (uint64_t)page << 32 | version;
    uint64_t kind = next_random(&state) % 16;

    if (kind == 0)
        memset(words, 0, PAGE);
    else if (kind <= 2)
        for (int i = 0; i < WORDS; i++)
            words[i] = next_random(&state);
    else if (kind == 3)
        for (int i = 0; i < WORDS; i++)
            words[i] = state;
    else
        fill_heap(words, state);
}
