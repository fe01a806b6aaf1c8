/* SPDX-License-Identifier: BSD-3-Clause */
/* What a target that goes down gets from a cache device, whatever was let go of before, and
 * whatever its source has failed to do. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <string.h>

#include "aging.h"
#include "fixture.h"
#include "index.h"

enum { PAGES = 600, AGAIN = 500, ROOM = 16 << 20 };

static struct tm_device *device;

/* All pages are put, and the first AGAIN are used again. */
static void fill_tmem(void)
{
    uint8_t content[TM_PAGE];
    CHECK(tm_cache(device, PAGES * TM_PAGE, 0) == 0);
    CHECK(atomic_load(&tm_counters(device)->pages_in_tmem) == PAGES);
    for (uint64_t page = 0; page < AGAIN; page++)
        CHECK(tm_read(device, content, TM_PAGE, page * TM_PAGE) == 0);
}

static uint64_t evict(enum tm_use use)
{
    uint64_t freed;
    CHECK(tm_demote(device, UINT64_MAX, (struct tm_filter){.bounded = true, .use = use}, &freed) ==
          0);
    return freed;
}

/* What came in for the first time was too little; then nobody reads any more. */
static void test_pages_of_any_age_go_although_others_did_not_suffice(void)
{
    fill_tmem();
    aging_begin_generation(device);
    CHECK(evict(TM_USED_ONCE) && atomic_load(&tm_counters(device)->pages_in_tmem) == AGAIN);
    CHECK(evict(TM_ANY_USE) && !atomic_load(&tm_counters(device)->pages_in_tmem));
}

/* A bound on what demotion writes says nothing of pages that go without a write. */
static void test_pages_go_after_a_failed_sync(void)
{
    struct tm_control *control = (struct tm_control *)(device->base + TM_CONTROL_OFFSET);
    fill_tmem();
    atomic_store(&control->demotion_writes.complement, UINT64_MAX);
    atomic_store(&device->counters->sync_failed, 1);
    CHECK(evict(TM_ANY_USE) && !atomic_load(&tm_counters(device)->pages_in_tmem));
}

int main(void)
{
    static const uint8_t states[] = {TM_STATE_FILE, TM_STATE_FILE};
    struct tm_config config = config_of(PAGES, ROOM);
    config.ephemeral = true;
    config.bitmap_fd = -1;
    CHECK(pwrite(config.pool_fd, states, sizeof states, TM_STATES_OFFSET) == sizeof states);
    for (uint64_t page = 0; page < PAGES; page++)
        CHECK(pwrite(config.file_fd, &page, sizeof page, (off_t)(page * TM_PAGE + 1)) ==
              sizeof page);
    CHECK(pwrite(config.file_fd, "x", 1, 0) == 1);
    device = open_device(&config);
    test_pages_of_any_age_go_although_others_did_not_suffice();
    test_pages_go_after_a_failed_sync();
    tm_close(device);
    puts("ok");
    return 0;
}
