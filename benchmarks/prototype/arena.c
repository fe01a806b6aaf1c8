#include "store.h"

void arena_open(struct arena *arena, size_t pages, size_t data_bytes)
{
    size_t index_bytes = (pages * 8 + PAGE - 1) / PAGE * PAGE;
    arena->data_offset = (index_bytes + (256 << 10) - 1) >> 18 << 18;
    arena->fd = check(memfd_create("prototype", 0), "memfd_create");
    check(ftruncate(arena->fd, arena->data_offset + data_bytes), "ftruncate");
    check(fallocate(arena->fd, FALLOC_FL_KEEP_SIZE, 0, index_bytes), "fallocate");
    arena->map = mmap(NULL, arena->data_offset + data_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, arena->fd, 0);
    if (arena->map == MAP_FAILED)
        die("mmap");
    arena->index = (_Atomic uint64_t *)arena->map;
    arena->data = arena->map + arena->data_offset;
}

void arena_back(const struct arena *arena, size_t offset, size_t bytes)
{
    check(fallocate(arena->fd, FALLOC_FL_KEEP_SIZE, arena->data_offset + offset, bytes), "fallocate");
}

void arena_punch(const struct arena *arena, size_t offset, size_t bytes)
{
    int mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE;
    check(fallocate(arena->fd, mode, arena->data_offset + offset, bytes), "punch");
}

uint64_t arena_used(const struct arena *arena)
{
    struct stat st;
    check(fstat(arena->fd, &st), "fstat");
    return st.st_blocks * 512;
}
