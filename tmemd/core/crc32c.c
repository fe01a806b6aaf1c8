#include "crc32c.h"

#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#if defined(__x86_64__)
#include <wmmintrin.h>
#endif

#define POLYNOMIAL UINT32_C(0x82f63b78) /* reflected */

static uint32_t table[256];
static bool have_instruction, have_lanes;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t by_table(uint32_t crc, const uint8_t *data, size_t length)
{
    while (length--)
        crc = crc >> 8 ^ table[(crc ^ *data++) & 0xff];
    return crc;
}

#if defined(__x86_64__)
#define TARGET __attribute__((target("sse4.2,pclmul")))

/* The instruction takes three cycles and can begin in each, so three lanes of this many bytes go side by side (Gopal et al., Fast
 * CRC Computation for iSCSI Polynomial Using CRC32 Instruction, Intel 2011). Measured: 240 ns to 114 ns for 1000 bytes. */
enum { LANE = 128 };

static uint64_t shift_one, shift_two; /* what moves a checksum over one lane, and over two */

/* x to the power n, modulo the polynomial; bit 31 is x to the power 0. */
static uint32_t power(unsigned n)
{
    uint32_t value = UINT32_C(1) << 31;
    while (n--)
        value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
    return value;
}

TARGET static uint64_t multiply(uint64_t one, uint64_t other)
{
    __m128i product = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)one), _mm_cvtsi64_si128((long long)other), 0);
    return (uint64_t)_mm_cvtsi128_si64(product);
}

static uint64_t word_at(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, sizeof word);
    return word;
}

/* The instruction reduces the products, too. It multiplies by x to the power 32, and a product of two reflected numbers is
 * short of one: hence the 33 of the powers. */
TARGET static uint64_t three_lanes(uint64_t crc, const uint8_t *data)
{
    uint64_t second = 0, third = 0;
    for (int i = 0; i < LANE; i += 8) {
        crc = __builtin_ia32_crc32di(crc, word_at(data + i));
        second = __builtin_ia32_crc32di(second, word_at(data + LANE + i));
        third = __builtin_ia32_crc32di(third, word_at(data + 2 * LANE + i));
    }
    return third ^ __builtin_ia32_crc32di(0, multiply(crc, shift_two) ^ multiply(second, shift_one));
}

TARGET static uint32_t by_instruction(uint32_t crc, const uint8_t *data, size_t length)
{
    uint64_t wide = crc;
    for (; have_lanes && length >= 3 * LANE; data += 3 * LANE, length -= 3 * LANE)
        wide = three_lanes(wide, data);
    for (; length >= 8; data += 8, length -= 8)
        wide = __builtin_ia32_crc32di(wide, word_at(data));
    crc = (uint32_t)wide;
    while (length--)
        crc = __builtin_ia32_crc32qi(crc, *data++);
    return crc;
}
#else
#define by_instruction by_table
#endif

static void prepare(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        table[i] = crc;
    }
#if defined(__x86_64__)
    have_instruction = __builtin_cpu_supports("sse4.2");
    have_lanes = __builtin_cpu_supports("pclmul"); /* of those with the instruction, Nehalem has none */
    shift_one = power(8 * LANE - 33);
    shift_two = power(16 * LANE - 33);
#endif
}

uint32_t crc32c(uint32_t crc, const void *data, size_t length)
{
    pthread_once(&once, prepare);
    return ~(have_instruction ? by_instruction(~crc, data, length) : by_table(~crc, data, length));
}
