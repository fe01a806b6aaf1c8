/* What a refused put costs: a full pool does not compress a page to find out that there is no room.
 * Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <lz4.h>

#include "fixture.h"

enum {
    PAGES = 8192,
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

int main(void)
{
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
