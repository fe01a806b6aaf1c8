/* SPDX-License-Identifier: BSD-3-Clause */
/* What a refused put costs: a full pool does not compress a page to find out that there is no room.
 * Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <lz4.h>
#include <string.h>

#include "fixture.h"

enum {
    PAGES = 8192,
    MANY = 262144,
    FIRST = 2048,
    REFUSALS = 1024
}; /* of the pages before some are written through */

static unsigned compressed;

/* In place of the library's, which the core would call otherwise. */
int LZ4_compress_default(const char *from, char *to, int size, int room)
{
    compressed++;
    return LZ4_compress_fast(from, to, size, room, 1);
}

static int write_page(struct tm_device *device, uint32_t page)
{
    uint8_t content[TM_PAGE];
    for (size_t i = 0; i < sizeof content; i++)
        content[i] = (uint8_t)(rand() % 16);
    return tm_write(device, content, sizeof content, (uint64_t)page * TM_PAGE, false);
}

/* A page that repeats one word takes one of the smallest slots. */
static int write_same(struct tm_device *device, uint64_t page)
{
    uint8_t content[TM_PAGE];
    memset(content, (int)(page % 255) + 1, sizeof content);
    return tm_write(device, content, sizeof content, page * TM_PAGE, false);
}

/* Memory that lies scattered among the smallest slots is enough for a page. */
static void test_the_smallest_slots_are_compacted(void)
{
    struct tm_config config = config_of(MANY, 0);
    config.file_fd = config.bitmap_fd = -1;
    struct tm_device *device = open_device(&config);
    uint64_t n = 0;
    while (n < MANY && write_same(device, n) == 0)
        n++;
    CHECK(n > 8 * TM_PAGE / TM_SLOT_MIN && n < MANY);
    for (uint64_t page = 0; page < n; page++)
        if (page % 8)
            CHECK(tm_trim(device, TM_PAGE, page * TM_PAGE, false) == 0);
    CHECK(write_page(device, (uint32_t)n) == 0);
    tm_close(device);
}

int main(void)
{
    test_the_smallest_slots_are_compacted();
    struct tm_config config = config_of(PAGES, 4 << 20);
    struct tm_device *device = open_device(&config);
    uint32_t page = FIRST;
    while (!atomic_load(&tm_counters(device)->puts_refused))
        CHECK(write_page(device, page++) == 0);
    unsigned before = compressed;
    for (uint32_t i = 0; i < REFUSALS; i++)
        CHECK(write_page(device, page + i) == 0);
    CHECK(atomic_load(&tm_counters(device)->puts_refused) > REFUSALS && compressed == before);

    /* Once there is room again every page is worth a try. */
    uint32_t n = page - FIRST;
    CHECK(tm_trim(device, (uint64_t)n * TM_PAGE, (uint64_t)FIRST * TM_PAGE, false) == 0);
    for (uint32_t i = 0; i < n / 2; i++)
        CHECK(write_page(device, FIRST + i) == 0);
    CHECK(compressed == before + n / 2);
    tm_close(device);
    puts("ok");
    return 0;
}
