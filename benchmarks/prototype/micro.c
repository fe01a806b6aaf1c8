/* What the parts of a store cost on real pages: LZ4 in its variants, CRC32C, tmpfs memory. */
#include <errno.h>
#include <fcntl.h>
#include <lz4.h>
#include <nmmintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common.h"

/* lz4.h offers it to static linking only; Debian's shared library does not have it. */
int LZ4_compress_fast_extState_fastReset(void *state, const char *src, char *dst, int srcSize, int dstCapacity,
                                         int acceleration);

enum { BOUND = LZ4_COMPRESSBOUND(PAGE) };

static struct corpus corpus;
static uint8_t *compressed; /* one BOUND-sized place for each page */
static int *lengths;
static void *state;

static int compress_default(const uint8_t *src, uint8_t *dst)
{
    return LZ4_compress_default((const char *)src, (char *)dst, PAGE, BOUND);
}

static int compress_limited(const uint8_t *src, uint8_t *dst)
{
    return LZ4_compress_default((const char *)src, (char *)dst, PAGE, PAGE - 1);
}

static int compress_extstate(const uint8_t *src, uint8_t *dst)
{
    return LZ4_compress_fast_extState(state, (const char *)src, (char *)dst, PAGE, BOUND, 1);
}

static int compress_fastreset(const uint8_t *src, uint8_t *dst)
{
    return LZ4_compress_fast_extState_fastReset(state, (const char *)src, (char *)dst, PAGE, BOUND, 1);
}

static int compress_fastreset_2(const uint8_t *src, uint8_t *dst)
{
    return LZ4_compress_fast_extState_fastReset(state, (const char *)src, (char *)dst, PAGE, BOUND, 2);
}

static int compress_stream(const uint8_t *src, uint8_t *dst)
{
    LZ4_resetStream_fast(state);
    return LZ4_compress_fast_continue(state, (const char *)src, (char *)dst, PAGE, BOUND, 1);
}

static void time_compress(const char *name, int (*compress)(const uint8_t *, uint8_t *))
{
    uint8_t out[BOUND];
    double best = 1e9;
    uint64_t total = 0;
    for (int round = 0; round < 3; round++) {
        double start = now();
        total = 0;
        for (size_t i = 0; i < corpus.pages; i++)
            total += compress(corpus_page(&corpus, i), out);
        best = fmin(best, now() - start);
    }
    printf("  %-44s %6.0f ns/page, %llu bytes\n", name, best / corpus.pages * 1e9, (unsigned long long)total);
}

static void time_decompress(void)
{
    uint8_t out[PAGE];
    for (size_t i = 0; i < corpus.pages; i++)
        lengths[i] = compress_default(corpus_page(&corpus, i), compressed + i * BOUND);
    double start = now();
    for (size_t i = 0; i < corpus.pages; i++)
        LZ4_decompress_safe((char *)compressed + i * BOUND, (char *)out, lengths[i], PAGE);
    printf("  %-44s %6.0f ns/page\n", "LZ4_decompress_safe", (now() - start) / corpus.pages * 1e9);
}

static void time_crc(const char *name, uint32_t (*crc)(uint32_t, const uint8_t *, size_t), int cold)
{
    uint32_t sum = 0;
    double start = now();
    for (size_t i = 0; i < corpus.pages; i++)
        sum ^= crc(0, compressed + (cold ? i : i % 8) * BOUND, lengths[i % 8]);
    double seconds = now() - start;
    size_t bytes = 0;
    for (size_t i = 0; i < 8; i++)
        bytes += lengths[i];
    printf("  %-44s %6.0f ns/page of %zu bytes (%08x)\n", name, seconds / corpus.pages * 1e9, bytes / 8, sum);
}

/* Three independent streams hide the instruction's latency of 3 cycles; only for its price, the result is no CRC32C. */
static uint32_t crc_three_streams(uint32_t crc, const uint8_t *data, size_t length)
{
    size_t third = length / 24 * 8;
    uint64_t a = crc, b = 0, c = 0, x, y, z;
    for (size_t i = 0; i < third; i += 8) {
        memcpy(&x, data + i, 8);
        memcpy(&y, data + third + i, 8);
        memcpy(&z, data + 2 * third + i, 8);
        a = _mm_crc32_u64(a, x);
        b = _mm_crc32_u64(b, y);
        c = _mm_crc32_u64(c, z);
    }
    return crc32c(a ^ b ^ c, data + 3 * third, length - 3 * third);
}

static void time_same_filled(void)
{
    size_t same = 0;
    double start = now();
    for (size_t i = 0; i < corpus.pages; i++)
        same += !memcmp(corpus_page(&corpus, i), corpus_page(&corpus, i) + 8, PAGE - 8);
    double seconds = now() - start;
    printf("  %-44s %6.0f ns/page, %zu found\n", "is it one 8-byte word repeated", seconds / corpus.pages * 1e9, same);
}

static void time_fallocate(const char *path, const char *what)
{
    static const size_t pieces[] = {4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20};
    const size_t total = 256 << 20;
    for (size_t p = 0; p < sizeof pieces / sizeof *pieces; p++) {
        int fd = check(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), path);
        check(ftruncate(fd, total), "ftruncate");
        uint8_t *map = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        double start = now();
        for (size_t at = 0; at < total; at += pieces[p])
            check(fallocate(fd, FALLOC_FL_KEEP_SIZE, at, pieces[p]), "fallocate");
        double allocated = now();
        for (size_t at = 0; at < total; at += PAGE)
            map[at] = 1;
        double touched = now();
        for (size_t at = 0; at < total; at += pieces[p])
            check(fallocate(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, at, pieces[p]), "punch");
        double punched = now();
        double per_page = 1e9 * PAGE / total;
        printf("  %-12s %4zu KiB pieces: fallocate %5.0f, first touch %5.0f, punch %5.0f ns per 4 KiB\n", what,
               pieces[p] >> 10, (allocated - start) * per_page, (touched - allocated) * per_page,
               (punched - touched) * per_page);
        munmap(map, total);
        close(fd);
    }
}

/* 1.2 KiB copies at random places of a file that is allocated and touched: what the TLB costs. */
static void time_random_copies(const char *path, const char *what, size_t total)
{
    int fd = check(open(path, O_RDWR | O_CREAT | O_TRUNC, 0600), path);
    check(ftruncate(fd, total), "ftruncate");
    check(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, total), "fallocate");
    uint8_t *map = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (size_t at = 0; at < total; at += PAGE)
        map[at] = 1;
    uint64_t random = 1;
    uint8_t record[1200] = {0};
    size_t count = 2000000;
    double start = now();
    for (size_t i = 0; i < count; i++)
        memcpy(record, map + next_random(&random) % (total - PAGE) / 16 * 16, sizeof record);
    double read = now();
    for (size_t i = 0; i < count; i++)
        memcpy(map + next_random(&random) % (total - PAGE) / 16 * 16, record, sizeof record);
    printf("  %-20s %4zu MiB: 1200 bytes out %5.0f ns, in %5.0f ns\n", what, total >> 20, (read - start) / count * 1e9,
           (now() - read) / count * 1e9);
    munmap(map, total);
    close(fd);
}

static void tmpfs_costs(const char *huge)
{
    char directory[] = "/tmp/prototype-XXXXXX", path[64], options[32];
    if (!mkdtemp(directory))
        die("mkdtemp");
    snprintf(options, sizeof options, "huge=%s", huge);
    snprintf(path, sizeof path, "%s/file", directory);
    if (mount("tmpfs", directory, "tmpfs", 0, options) == 0) {
        time_fallocate(path, huge);
        time_random_copies(path, huge, 64 << 20);
        time_random_copies(path, huge, 1024 << 20);
        umount2(directory, MNT_DETACH);
    } else {
        printf("  tmpfs %s: %s\n", options, strerror(errno));
    }
    rmdir(directory);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: micro PAGES\n");
        return 2;
    }
    corpus_open(&corpus, argv[1]);
    state = calloc(1, LZ4_sizeofState());
    compressed = malloc(corpus.pages * BOUND);
    lengths = calloc(corpus.pages, sizeof *lengths);
    printf("%zu real pages\nLZ4\n", corpus.pages);
    for (int round = 0; round < 2; round++) {
        time_compress("LZ4_compress_default", compress_default);
        time_compress("LZ4_compress_default, room for 4095", compress_limited);
        time_compress("LZ4_compress_fast_extState", compress_extstate);
        time_compress("LZ4_compress_fast_extState_fastReset", compress_fastreset);
        time_compress("LZ4_compress_fast_extState_fastReset, accel 2", compress_fastreset_2);
        LZ4_initStream(state, LZ4_sizeofState());
        time_compress("LZ4_resetStream_fast + _compress_fast_continue", compress_stream);
        LZ4_initStream(state, LZ4_sizeofState());
    }
    time_decompress();
    printf("scans\n");
    time_crc("CRC32C, one stream, in cache", crc32c, 0);
    time_crc("CRC32C, one stream, from memory", crc32c, 1);
    time_crc("CRC32C, three streams, in cache", crc_three_streams, 0);
    time_crc("CRC32C, three streams, from memory", crc_three_streams, 1);
    time_same_filled();
    printf("tmpfs\n");
    tmpfs_costs("never");
    tmpfs_costs("within_size");
    return 0;
}
