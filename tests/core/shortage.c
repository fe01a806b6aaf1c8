/* SPDX-License-Identifier: BSD-3-Clause */
/* No buffer can be had: what needs one fails with ENOMEM, changes nothing and is right when there
 * is memory again. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "fixture.h"

enum { PAGES = 2048, PAGE = 600, ROOM = 64 << 20 };

static bool short_of_memory;

struct bounce *__real_bounce_get(void);
struct bounce *__wrap_bounce_get(void);
struct bounce *__wrap_bounce_get(void) { return short_of_memory ? NULL : __real_bounce_get(); }

int main(void)
{
    struct tm_config config = config_of(PAGES, ROOM);
    struct tm_device *device = open_device(&config);
    uint8_t old[TM_PAGE], new[TM_PAGE], content[TM_PAGE];
    const uint64_t at = (uint64_t)PAGE * TM_PAGE;
    uint64_t freed;
    for (size_t i = 0; i < TM_PAGE; i++) {
        old[i] = (uint8_t)rand();
        new[i] = (uint8_t)rand();
    }

    CHECK(tm_write(device, old, TM_PAGE, at, false) == 0);
    short_of_memory = true;
    CHECK(tm_demote(device, TM_PAGE, (struct tm_filter){0}, &freed) == ENOMEM && !freed);
    CHECK(tm_drain(device) == ENOMEM);
    short_of_memory = false;
    CHECK(tm_drain(device) == 0);

    short_of_memory = true;
    CHECK(tm_read(device, content, TM_PAGE, at) == ENOMEM);
    CHECK(tm_write(device, "x", 1, at + 5, false) == ENOMEM);
    CHECK(tm_write(device, old, TM_PAGE, 0, false) == ENOMEM); /* written through */
    freeze(device, 1);
    CHECK(tm_write(device, new, TM_PAGE, at, false) == ENOMEM); /* a spill */
    short_of_memory = false;
    CHECK(tm_read(device, content, TM_PAGE, at) == 0 && memcmp(content, old, TM_PAGE) == 0);
    CHECK(tm_read(device, content, 1, 0) == 0 && content[0] == 0);
    CHECK(tm_write(device, new, TM_PAGE, at, false) == 0);
    CHECK(tm_read(device, content, TM_PAGE, at) == 0 && memcmp(content, new, TM_PAGE) == 0);

    tm_close(device);
    puts("ok");
    return 0;
}
