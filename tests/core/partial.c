/* What a kill between the reading of a page and the writing of a part of it leaves: words that
 * exist. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include "fixture.h"
#include "overwrite.h"

enum { PAGES = 2048, PAGE = 600, ROOM = 64 << 20 };

static unsigned looked_at;

int __real_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run)
{
    uint64_t word = index_word(device, run->first);
    looked_at++;
    CHECK(word_kind(word) != TM_NOWHERE || word == TM_NOWHERE);
    return __real_overwrite_locked(device, run);
}

int main(void)
{
    char byte;
    struct tm_config config = config_of(PAGES, ROOM);
    struct tm_device *device = open_device(&config);
    freeze(device, 1); /* the put is refused: the part goes to the file */
    CHECK(tm_write(device, "x", 1, (uint64_t)PAGE * TM_PAGE + 5, false) == 0 && looked_at == 1);
    CHECK(tm_read(device, &byte, 1, (uint64_t)PAGE * TM_PAGE + 5) == 0 && byte == 'x');
    tm_close(device);
    puts("ok");
    return 0;
}
