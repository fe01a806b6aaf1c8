/* What all parts of the prototype share: the corpus, time, random numbers, CRC32C, errors. */
#pragma once
#include <fcntl.h>
#include <math.h>
#include <nmmintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

struct corpus {
    const uint8_t *data;
    size_t pages;
};

static inline _Noreturn void die(const char *what)
{
    perror(what);
    exit(1);
}

static inline int check(int result, const char *what)
{
    if (result < 0)
        die(what);
    return result;
}

static inline double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

/* splitmix64 */
static inline uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static inline uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t length)
{
    uint64_t sum = ~crc, word;
    for (; length >= 8; data += 8, length -= 8) {
        memcpy(&word, data, 8);
        sum = _mm_crc32_u64(sum, word);
    }
    while (length--)
        sum = _mm_crc32_u8(sum, *data++);
    return ~(uint32_t)sum;
}

static inline void corpus_open(struct corpus *corpus, const char *path)
{
    struct stat st;
    int fd = check(open(path, O_RDONLY), path);
    check(fstat(fd, &st), path);
    corpus->pages = st.st_size / PAGE;
    corpus->data = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (corpus->data == MAP_FAILED)
        die(path);
    close(fd);
}

static inline const uint8_t *corpus_page(const struct corpus *corpus, size_t page)
{
    return corpus->data + page * PAGE;
}
