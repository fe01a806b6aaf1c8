#pragma once

#include <stddef.h>
#include <stdint.h>

/* CRC32C (Castagnoli; RFC 3720, appendix B.4) of data, continuing from crc (0 to begin). */
uint32_t crc32c(uint32_t crc, const void *data, size_t length);
