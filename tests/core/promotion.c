/* What promotion may not do: wait, or put a page whose word has changed since it was read. Exit
 * status 0 and 'ok'. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "promote.h"

enum { PAGES = 2048, PAGE = 600, LIMIT = 64 << 20 };

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

static struct tm_device *device;
static struct tm_control *control;

static int memory_file(const char *name, uint64_t size)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
    return fd;
}

static void open_device(void)
{
    struct tm_layout layout;
    char error[256];
    uint64_t size = (uint64_t)PAGES * TM_PAGE;
    CHECK(tm_layout_for(size, &layout) == 0);
    struct tm_config config = {
        .name = "promotion",
        .pool_fd = memory_file("pool", layout.data_offset + layout.data_bytes),
        .file_fd = memory_file("file", size),
        .bitmap_fd = memory_file("map", 2 * TM_PAGE),
        .size = size,
        .limit = LIMIT,
        .region = 1 << 20,
        .file_bytes = size,
    };
    CHECK(tm_open(&config, &device, error, sizeof error) == 0);
    control =
        mmap(NULL, TM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, config.pool_fd, TM_CONTROL_OFFSET);
    CHECK(control != MAP_FAILED);
}

/* Write the page while puts are refused; returns its word. */
static uint64_t spill(uint8_t version)
{
    uint8_t content[TM_PAGE];
    for (size_t i = 0; i < sizeof content; i++)
        content[i] = (uint8_t)(i * version);
    atomic_store(&control->frozen.value, 1);
    atomic_store(&control->frozen.complement, ~UINT64_C(1));
    CHECK(tm_write(device, content, sizeof content, (uint64_t)PAGE * TM_PAGE, false) == 0);
    atomic_store(&control->frozen.value, 0);
    atomic_store(&control->frozen.complement, ~UINT64_C(0));
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
    open_device();
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
    munmap(control, TM_PAGE);
    tm_close(device);
    puts("ok");
    return 0;
}
