#include <lz4.h>

#include "store.h"

struct header {
    uint32_t page, crc;
    uint16_t length, encoding;
};

_Static_assert(sizeof(struct header) == HEADER, "the record header is 12 bytes");

static struct header read_header(const uint8_t *record)
{
    struct header header;
    memcpy(&header, record, HEADER);
    return header;
}

static uint32_t checksum(const struct header *header, const uint8_t *payload)
{
    uint32_t crc = crc32c(header->page, (const uint8_t *)&header->length, 4);
    return crc32c(crc, payload, header->length);
}

size_t record_encode(uint8_t record[MAX_RECORD + 64], uint32_t page, const uint8_t *src)
{
    struct header header = {.page = page, .encoding = 1};
    header.length = LZ4_compress_default((const char *)src, (char *)record + HEADER, PAGE, PAGE - 1);
    if (!header.length) {
        memcpy(record + HEADER, src, PAGE);
        header = (struct header){.page = page, .length = PAGE};
    }
    header.crc = checksum(&header, record + HEADER);
    memcpy(record, &header, HEADER);
    return HEADER + header.length;
}

void record_decode(const uint8_t *record, uint32_t page, uint8_t *dst)
{
    struct header header = read_header(record);
    const uint8_t *payload = record + HEADER;
    if (header.page != page || checksum(&header, payload) != header.crc) {
        fprintf(stderr, "page %u: damaged record\n", page);
        exit(1);
    }
    if (header.encoding)
        LZ4_decompress_safe((const char *)payload, (char *)dst, header.length, PAGE);
    else
        memcpy(dst, payload, PAGE);
}

uint32_t record_page(const uint8_t *record)
{
    return read_header(record).page;
}

size_t record_length(const uint8_t *record)
{
    return HEADER + read_header(record).length;
}
