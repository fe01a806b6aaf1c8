/* What a kill between the reading of a page and the writing of a part of it leaves: words that
 * exist. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "overwrite.h"

enum { PAGES = 2048, PAGE = 600, LIMIT = 64 << 20 };

static unsigned looked_at;

static int memory_file(uint64_t size)
{
    int fd = memfd_create("partial", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size) != 0)
        abort();
    return fd;
}

int __real_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run);
int __wrap_overwrite_locked(struct tm_device *device, struct overwrite *run)
{
    uint64_t word = index_word(device, run->first);
    looked_at++;
    if (word_kind(word) == TM_NOWHERE && word != TM_NOWHERE) {
        fprintf(stderr, "a word of no kind: %#llx\n", (unsigned long long)word);
        exit(1);
    }
    return __real_overwrite_locked(device, run);
}

int main(void)
{
    struct tm_layout layout;
    struct tm_device *device;
    char error[256], byte;
    uint64_t size = (uint64_t)PAGES * TM_PAGE;
    tm_layout_for(size, &layout);
    struct tm_config config = {
        .name = "partial",
        .pool_fd = memory_file(layout.data_offset + layout.data_bytes),
        .file_fd = memory_file(size),
        .bitmap_fd = memory_file(2 * TM_PAGE),
        .size = size,
        .limit = LIMIT,
        .region = 1 << 20,
        .file_bytes = size,
    };
    if (tm_open(&config, &device, error, sizeof error) != 0)
        abort();
    struct tm_control *control =
        mmap(NULL, TM_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, config.pool_fd, TM_CONTROL_OFFSET);
    atomic_store(&control->frozen.value, 1); /* the put is refused: the part goes to the file */
    atomic_store(&control->frozen.complement, ~UINT64_C(1));
    if (tm_write(device, "x", 1, (uint64_t)PAGE * TM_PAGE + 5, false) != 0 || looked_at != 1)
        abort();
    if (tm_read(device, &byte, 1, (uint64_t)PAGE * TM_PAGE + 5) != 0 || byte != 'x')
        abort();
    munmap(control, TM_PAGE);
    tm_close(device);
    puts("ok");
    return 0;
}
