/* The two candidates behind one interface, and what they share: tmpfs memory, records, the index. */
#pragma once
#include "common.h"

enum {
    HEADER = 12,    /* page number, CRC32C, length, encoding, as in the pool file */
    MAX_RECORD = HEADER + PAGE,
};

/* A sparse tmpfs file: the index, 8 bytes for each page, then memory for records. */
struct arena {
    int fd;
    uint8_t *map;
    _Atomic uint64_t *index;
    uint8_t *data;
    size_t data_offset;
};

struct store {
    const char *name;
    void (*open)(size_t pages, double budget);
    void (*put)(uint32_t page, const uint8_t *src);
    void (*get)(uint32_t page, uint8_t *dst);
    void (*settle)(void);   /* what would be done in idle time */
    uint64_t copies;    /* records moved so far */
    uint64_t payload;   /* compressed bytes of all live records */
    struct arena arena;
};

extern struct store slots, logged;

void arena_open(struct arena *arena, size_t pages, size_t data_bytes);
void arena_back(const struct arena *arena, size_t offset, size_t bytes);
void arena_punch(const struct arena *arena, size_t offset, size_t bytes);
uint64_t arena_used(const struct arena *arena);

/* Make a record of a page in 'record'; returns its whole length. */
size_t record_encode(uint8_t record[MAX_RECORD + 64], uint32_t page, const uint8_t *src);
void record_decode(const uint8_t *record, uint32_t page, uint8_t *dst);
uint32_t record_page(const uint8_t *record);
size_t record_length(const uint8_t *record);
