/* What a refused put costs: a full pool does not compress a page to find out that there is no room.
 * Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <lz4.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "state.h"

enum {
    PAGES = 8192,
    FIRST = 2048,
    REFUSALS = 1024
}; /* of the pages before some are written through */

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

static unsigned compressed;

/* In place of the library's, which the core would call otherwise. */
int LZ4_compress_default(const char *from, char *to, int size, int room)
{
    compressed++;
    return LZ4_compress_fast(from, to, size, room, 1);
}

static int memory_file(uint64_t size)
{
    int fd = memfd_create("refusal", MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
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
    struct tm_layout layout;
    struct tm_device *device;
    char error[256];
    CHECK(tm_layout_for((uint64_t)PAGES * TM_PAGE, &layout) == 0);
    struct tm_config config = {
        .name = "refusal",
        .pool_fd = memory_file(layout.data_offset + layout.data_bytes),
        .bitmap_fd = -1,
        .file_fd = memory_file((uint64_t)PAGES * TM_PAGE),
        .file_bytes = (uint64_t)PAGES * TM_PAGE,
        .size = (uint64_t)PAGES * TM_PAGE,
        .limit = layout.minimum + (4 << 20),
    };
    CHECK(tm_open(&config, &device, error, sizeof error) == 0);
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
