/* SPDX-License-Identifier: BSD-3-Clause */
/* How long a guest waits for a page that is in swap: push pages of our own out, touch them in any
 * order, and time those touches that the kernel counts as major faults.
 *
 * Usage: faults PAGES RECLAIM, the latter memory.reclaim of the memory cgroup that it runs in.
 * Prints the number of faults, then p50, p90 and p99 in microseconds. Exit status: 0, 1 a wrong
 * page, 2 usage or no memory, 3 the pages do not go out. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, WORDS = PAGE / 8, TRIES = 200 };

/* splitmix64 */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* A third of it is random, the rest pointers and counters. The first word is the page's number. */
static void fill(uint64_t *words, uint64_t page)
{
    uint64_t state = page;
    words[0] = page;
    for (int i = 1; i < WORDS; i++)
        words[i] = i % 3 ? UINT64_C(0x00007f1234560000) + (uint64_t)i : next_random(&state);
}

static size_t count_resident(uint8_t *memory, size_t pages, uint8_t *resident)
{
    size_t n = 0;
    mincore(memory, pages * PAGE, resident);
    for (size_t page = 0; page < pages; page++)
        n += resident[page] & 1;
    return n;
}

/* What is still being written when it is reclaimed stays, and goes the next time. */
static int push_out(uint8_t *memory, size_t pages, const char *reclaim)
{
    static const char ALL[] = "1G";
    uint8_t *resident = malloc(pages);
    int file = open(reclaim, O_WRONLY | O_CLOEXEC), tries = 0;
    while (resident && count_resident(memory, pages, resident) > pages / 100 && tries++ < TRIES) {
        ssize_t ignored = write(file, ALL, sizeof ALL - 1); /* there is not as much: EAGAIN */
        (void)ignored;
        usleep(20000);
    }
    close(file);
    free(resident);
    return tries < TRIES ? 0 : -1;
}

static void shuffle(uint32_t *order, size_t n)
{
    uint64_t state = 1;
    for (size_t i = 0; i < n; i++)
        order[i] = (uint32_t)i;
    for (size_t i = n - 1; i > 0; i--) {
        size_t j = next_random(&state) % (i + 1);
        uint32_t other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
}

static long major_faults(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_majflt;
}

static double now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1e6 + now.tv_nsec / 1e3;
}

/* Touch all pages; returns how many were major faults, or -1 when a page is not what it was. */
static long touch(const uint8_t *memory, const uint32_t *order, size_t pages, double *us)
{
    long n = 0;
    for (size_t i = 0; i < pages; i++) {
        const volatile uint64_t *word = (const uint64_t *)(memory + (size_t)order[i] * PAGE);
        long before = major_faults();
        double start = now_us();
        uint64_t found = *word;
        double end = now_us();
        if (found != order[i])
            return -1;
        if (major_faults() > before)
            us[n++] = end - start;
    }
    return n;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    size_t pages = argc == 3 ? strtoul(argv[1], NULL, 10) : 0;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    uint32_t *order = malloc(pages * sizeof *order);
    double *us = malloc(pages * sizeof *us);

    if (!pages || memory == MAP_FAILED || !order || !us)
        return fputs("usage: faults PAGES RECLAIM\n", stderr), 2;
    madvise(memory, pages * PAGE, MADV_NOHUGEPAGE);
    for (size_t page = 0; page < pages; page++)
        fill((uint64_t *)(memory + page * PAGE), page);
    if (push_out(memory, pages, argv[2]))
        return fputs("faults: the pages do not go out\n", stderr), 3;
    shuffle(order, pages);
    long n = touch(memory, order, pages, us);
    if (n < 0)
        return fputs("faults: a page is WRONG\n", stderr), 1;
    qsort(us, (size_t)n, sizeof *us, compare);
    printf("%ld %.1f %.1f %.1f\n", n, us[n / 2], us[n * 9 / 10], us[n * 99 / 100]);
    return 0;
}
