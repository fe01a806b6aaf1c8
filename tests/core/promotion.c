/* SPDX-License-Identifier: BSD-3-Clause */
/* What promotion may not do: wait, or put a page whose word has changed since it was read. Exit
 * status 0 and 'ok'. */
#define _GNU_SOURCE
#include <sys/syscall.h>

#include "fixture.h"
#include "promote.h"

enum { PAGES = 2048, PAGE = 600, ROOM = 64 << 20 };

static struct tm_device *device;

/* Write the page while puts are refused; returns its word. */
static uint64_t spill(uint8_t version)
{
    uint8_t content[TM_PAGE];
    for (size_t i = 0; i < sizeof content; i++)
        content[i] = (uint8_t)(i * version);
    freeze(device, 1);
    CHECK(tm_write(device, content, sizeof content, (uint64_t)PAGE * TM_PAGE, false) == 0);
    freeze(device, 0);
    CHECK(word_kind(index_word(device, PAGE)) == TM_FILE);
    return index_word(device, PAGE);
}

static uint8_t second_byte(void)
{
    uint8_t content[TM_PAGE];
    CHECK(tm_read(device, content, sizeof content, (uint64_t)PAGE * TM_PAGE) == 0);
    return content[1];
}

/* Writers who come while the page is read for tm_cache: one before its first read, one after its
 * second. */
static enum { NOBODY, BEFORE, AFTER } writer;

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    if (writer == BEFORE) {
        writer = NOBODY;
        spill(2);
        writer = AFTER;
    }
    return syscall(SYS_pread64, fd, buffer, length, offset);
}

void __real_unlock_io(struct locks *locks, struct io_range *io);
void __wrap_unlock_io(struct locks *locks, struct io_range *io);
void __wrap_unlock_io(struct locks *locks, struct io_range *io)
{
    __real_unlock_io(locks, io);
    if (writer == AFTER) {
        writer = NOBODY;
        spill(1);
    }
}

int main(void)
{
    uint8_t old[TM_PAGE];
    struct tm_config config = config_of(PAGES, ROOM);
    device = open_device(&config);
    uint64_t word = spill(1);
    CHECK(file_read(&device->file, PAGE, 1, old) == 0);

    /* Somebody is changing the page: it does not wait. */
    lock_pages(&device->locks, PAGE, 1);
    promote_page(device, PAGE, old, word);
    unlock_pages(&device->locks, PAGE, 1);
    CHECK(index_word(device, PAGE) == word);

    /* It was overwritten, trimmed, or its whole block was, since it was read. */
    uint64_t second = spill(2);
    promote_page(device, PAGE, old, word);
    CHECK(index_word(device, PAGE) == second && second_byte() == 2);
    CHECK(tm_trim(device, TM_PAGE, (uint64_t)PAGE * TM_PAGE, false) == 0);
    promote_page(device, PAGE, old, word);
    CHECK(word_kind(index_word(device, PAGE)) == TM_ZERO && second_byte() == 0);
    CHECK(tm_trim(device, (uint64_t)TM_BLOCK_PAGES * TM_PAGE, (uint64_t)TM_BLOCK_PAGES * TM_PAGE,
                  false) == 0);
    promote_page(device, PAGE, old, word);
    CHECK(second_byte() == 0);

    /* It was only read since, in a later generation. */
    word = spill(1);
    uint64_t before = atomic_load(&tm_counters(device)->promotions);
    for (unsigned i = 0; i < TM_ANCIENT / 2; i++)
        tm_begin_generation(device);
    CHECK(second_byte() == 1 && word_kind(index_word(device, PAGE)) == TM_FILE);
    CHECK(word_generation(index_word(device, PAGE)) != word_generation(word));
    promote_page(device, PAGE, old, word);
    CHECK(atomic_load(&tm_counters(device)->promotions) == before + 1);
    CHECK(word_kind(index_word(device, PAGE)) == TM_TMEM && second_byte() == 1);

    /* It was overwritten before it was read, and again with what it had been after that. */
    spill(1);
    writer = BEFORE;
    CHECK(tm_cache(device, TM_PAGE, (uint64_t)PAGE * TM_PAGE) == 0);
    CHECK(writer == NOBODY && second_byte() == 1);

    /* The lock was let go each time. */
    lock_pages(&device->locks, PAGE, 1);
    unlock_pages(&device->locks, PAGE, 1);
    tm_close(device);
    puts("ok");
    return 0;
}
