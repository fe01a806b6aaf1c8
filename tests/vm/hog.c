/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A memory-hungry workload that verifies its own pages: fill memory with pages that say where they
 * belong, verify all of them, overwrite a third, verify the first half again. Before a page is
 * read, /proc/self/pagemap tells whether it is in swap, so that the verdict counts only pages that
 * really went out and came back.
 *
 * Usage: hog MIB. Exit status: 0 all pages right, 1 a wrong page, 2 usage or no memory.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../support/content.h"

enum { PAGES_PER_MIB = (1 << 20) / PAGE };
enum { RUN = 64 }; /* pages overwritten together, as programs do */

static const uint64_t PAGEMAP_SWAPPED = UINT64_C(1) << 62;

struct hog {
    uint8_t *memory;
    size_t pages;
    int pagemap;
    uint8_t *came_back; /* one byte for each page: it was in swap when it was verified */
    size_t swapped;     /* how many of those are set */
    size_t wrong;       /* pages that did not hold what they should */
};

static int is_overwritten(size_t page) { return page / RUN % 3 == 0; }

static void note_if_swapped(struct hog *hog, size_t page)
{
    uintptr_t number = ((uintptr_t)hog->memory + page * PAGE) / PAGE;
    uint64_t entry = 0;

    if (hog->came_back[page])
        return;
    if (pread(hog->pagemap, &entry, sizeof entry, (off_t)(number * sizeof entry)) != sizeof entry)
        return;
    if (entry & PAGEMAP_SWAPPED) {
        hog->came_back[page] = 1;
        hog->swapped++;
    }
}

static void verify(struct hog *hog, size_t pages, unsigned round)
{
    uint64_t want[WORDS];

    for (size_t page = 0; page < pages; page++) {
        note_if_swapped(hog, page);
        fill_page(want, page, is_overwritten(page) ? round : 1);
        if (memcmp(hog->memory + page * PAGE, want, PAGE) != 0) {
            printf("hog: page %zu is WRONG\n", page);
            hog->wrong++;
        }
    }
}

static void write_pages(struct hog *hog, unsigned round)
{
    for (size_t page = 0; page < hog->pages; page++)
        if (round == 1 || is_overwritten(page))
            fill_page((uint64_t *)(hog->memory + page * PAGE), page, round);
}

static void step(const char *what, const struct hog *hog)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("hog: %7.1f s  %-34s %zu MiB came back from swap so far\n",
           now.tv_sec + now.tv_nsec / 1e9, what, hog->swapped / PAGES_PER_MIB);
    fflush(stdout);
}

static void run(struct hog *hog)
{
    write_pages(hog, 1);
    step("filled all;", hog);
    verify(hog, hog->pages, 1);
    step("verified all;", hog);
    write_pages(hog, 2);
    step("overwrote a third;", hog);
    verify(hog, hog->pages / 2, 2);
    step("verified the first half again;", hog);
}

static int open_hog(struct hog *hog, size_t mib)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

    hog->pages = mib * PAGES_PER_MIB;
    hog->memory = mmap(NULL, hog->pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    hog->came_back = calloc(hog->pages, 1);
    hog->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (hog->memory == MAP_FAILED || !hog->came_back || hog->pagemap < 0) {
        perror("hog");
        return -1;
    }
    madvise(hog->memory, hog->pages * PAGE, MADV_NOHUGEPAGE); /* fails where the kernel has none */
    return 0;
}

int main(int argc, char **argv)
{
    struct hog hog = {0};
    size_t mib = argc == 2 ? strtoul(argv[1], NULL, 10) : 0;

    if (mib == 0) {
        fputs("usage: hog MIB\n", stderr);
        return 2;
    }
    if (open_hog(&hog, mib))
        return 2;
    run(&hog);
    printf("hog: %zu MiB verified, %zu MiB came back from swap, %zu pages wrong\n", mib,
           hog.swapped / PAGES_PER_MIB, hog.wrong);
    return hog.wrong != 0;
}
