/* The pool file's layout and the words of its index; docs/pool-format.md is the same in prose. */
#ifndef TM_LAYOUT_H
#define TM_LAYOUT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum {
    TM_PAGE = 4096,
    TM_BLOCK_PAGES = 512, /* pages whose index words share one page of the index */
    TM_COUNTERS_OFFSET = TM_PAGE,
    TM_CONTROL_OFFSET = 2 * TM_PAGE,
    TM_STATISTICS_OFFSET = 3 * TM_PAGE,
    TM_STATES_OFFSET = 4 * TM_PAGE,
    TM_SPAN_BYTES = 64 * TM_PAGE, /* 64 pages, so that one word says which of them are backed */
    TM_SPAN_PAGES = TM_SPAN_BYTES / TM_PAGE,
    TM_SLOT_ALIGN = 16,
    TM_SLOT_MIN = 32,
    TM_RECORD_HEADER = 12,
    TM_SLOT_MAX = 4112, /* a raw page and its header, rounded up */
};

#define TM_MAX_SIZE (UINT64_C(1) << 44)     /* page numbers are 32 bits in records */
#define TM_MAX_DATA (UINT64_C(1) << 40)     /* locations are 36 bits of 16 bytes */

/* What all pages of a block are in a pool that was just made; attaching spells it out in the index. */
enum tm_state { TM_STATE_INDEX = 0, TM_STATE_FILE = 1, TM_STATE_LOST = 2, TM_STATE_ZERO = 3 };

/* TM_LOST: gone with the host. TM_TORN: a write to the file failed, and what is there now is not what was. */
enum tm_kind { TM_NOWHERE = 0, TM_TMEM = 1, TM_FILE = 2, TM_ZERO = 3, TM_LOST = 4, TM_TORN = 5 };

enum tm_encoding { TM_RAW = 0, TM_LZ4 = 1, TM_SAME = 2 };

#define TM_WORD_KIND UINT64_C(7)
#define TM_WORD_ENCODING (UINT64_C(3) << 3)
#define TM_WORD_GENERATION (UINT64_C(15) << 8)
#define TM_WORD_LENGTH (UINT64_C(0x1fff) << 12)
#define TM_WORD_CLEAN (UINT64_C(1) << 5)      /* tmem: the file holds the same */
#define TM_WORD_WRITING (UINT64_C(1) << 6)    /* the page is being written to the file; gone when it changes meanwhile */
#define TM_WORD_UNVERIFIED (UINT64_C(1) << 7) /* file: no checksum of what was there before is known */
#define TM_OLD_CRC UINT32_C(0xfffff)          /* as much of the old checksum as a file word keeps while it is WRITING */
#define TM_GENERATIONS 16u
#define TM_PROMOTE_AGE 6u /* a page that comes back from the file when it is younger is put again */
#define TM_ANCIENT (TM_GENERATIONS - 1) /* the age of generation 0; the others take turns */

static inline enum tm_kind tm_kind(uint64_t word) { return (enum tm_kind)(word & TM_WORD_KIND); }
static inline enum tm_encoding tm_encoding(uint64_t word) { return (enum tm_encoding)((word & TM_WORD_ENCODING) >> 3); }
static inline unsigned tm_generation(uint64_t word) { return (unsigned)((word & TM_WORD_GENERATION) >> 8); }
static inline uint32_t tm_length(uint64_t word) { return (uint32_t)((word & TM_WORD_LENGTH) >> 12); }
static inline uint64_t tm_location(uint64_t word) { return (word >> 28) * TM_SLOT_ALIGN; }
static inline uint32_t tm_file_crc(uint64_t word) { return (uint32_t)(word >> 32); }
static inline uint32_t tm_old_crc(uint64_t word) { return (uint32_t)(word >> 12) & TM_OLD_CRC; }

static inline uint64_t tm_tmem_word(uint64_t location, uint32_t length, enum tm_encoding encoding, unsigned generation)
{
    return location / TM_SLOT_ALIGN << 28 | (uint64_t)length << 12 | (uint64_t)generation << 8 |
           (uint64_t)encoding << 3 | TM_TMEM;
}

static inline uint64_t tm_file_word(uint32_t crc, unsigned generation)
{
    return (uint64_t)crc << 32 | (uint64_t)generation << 8 | TM_FILE;
}

/* The word of a page in the file that is being overwritten by one with this checksum. A process that is killed meanwhile leaves
 * it so: the page is what either checksum says. Of what no checksum was known before, whatever is found is taken. */
static inline uint64_t tm_overwritten_word(uint64_t word, uint32_t crc)
{
    bool known = !(word & (TM_WORD_WRITING | TM_WORD_UNVERIFIED));
    uint64_t old = known ? (uint64_t)(tm_file_crc(word) & TM_OLD_CRC) << 12 : TM_WORD_UNVERIFIED;
    return (uint64_t)crc << 32 | old | (word & TM_WORD_GENERATION) | TM_WORD_WRITING | TM_FILE;
}

static inline uint64_t tm_with_generation(uint64_t word, unsigned generation)
{
    return (word & ~TM_WORD_GENERATION) | (uint64_t)generation << 8;
}

/* Whether two words of a page differ at most in when it was used. */
static inline bool tm_same_content(uint64_t one, uint64_t other)
{
    return tm_with_generation(one, 0) == tm_with_generation(other, 0);
}

/* Whether two words count the same by age: where the page lies, or its checksum, makes no difference. */
static inline bool tm_same_age(uint64_t one, uint64_t other)
{
    uint64_t counted = TM_WORD_KIND | TM_WORD_ENCODING | TM_WORD_CLEAN | TM_WORD_GENERATION | TM_WORD_LENGTH;
    return ((one ^ other) & counted) == 0;
}

static inline uint64_t tm_with_location(uint64_t word, uint64_t location)
{
    return (word & ((UINT64_C(1) << 28) - 1)) | location / TM_SLOT_ALIGN << 28;
}

/* Whether libblkid (util-linux 2.38; strace of blkid -p) reads the page when it looks for signatures: half a MiB at either
 * end, and four places more. It gives up at the first error, and swapon asks it: these pages are never lost. */
static inline bool tm_is_probed(uint64_t pages, uint64_t page)
{
    return page <= 128 || pages - page <= 128 || page == 256 || page == 512 || page == 1024 || pages - page == 386;
}

/* Bytes of the slot that holds a record of this payload length. */
static inline uint32_t tm_slot_size(uint32_t length)
{
    uint32_t size = (TM_RECORD_HEADER + length + TM_SLOT_ALIGN - 1) & ~(uint32_t)(TM_SLOT_ALIGN - 1);
    return size < TM_SLOT_MIN ? TM_SLOT_MIN : size;
}

struct tm_record {
    _Atomic uint32_t page; /* atomic: the compactor looks at slots that are being written */
    uint32_t crc;
    uint16_t length;
    uint16_t encoding;
    uint8_t payload[];
};

/* The counters page; tmemd.store.poolfile.Counters names the same fields in the same order. Writer: the serving process, which
 * keeps its answers to requests in the page's second half (tmemd.store.requests). */
struct tm_counters {
    _Atomic uint64_t used, limit, minimum;
    _Atomic uint64_t pages_in_tmem, pages_in_file, pages_lost;
    _Atomic uint64_t payload_bytes, index_bytes;
    _Atomic uint64_t puts, puts_refused, puts_zero, puts_same, puts_raw;
    _Atomic uint64_t gets, file_reads, invalidates, spills, demotions, moves;
    _Atomic uint64_t bad_checksums, io_errors;
    _Atomic uint64_t reads, writes, trims, flushes;
    _Atomic uint64_t granules_set, pid;
    _Atomic uint64_t demotion_writes, promotions;
    _Atomic uint64_t sync_failed; /* not 0: what was written to the file before may be lost, whatever later syncs say */
};

/* Latencies of one kind of page operation. The bounds are two in each octave: counts[2k] is of those below 256 * 2^k ns,
 * counts[2k + 1] of those from there below 384 * 2^k ns; the last is of all that took longer. */
enum { TM_LATENCIES = 47 };
struct tm_histogram {
    _Atomic uint64_t sum_ns, counts[TM_LATENCIES];
};

/* The statistics page; tmemd.store.poolfile.Latencies and Ages name the same fields. Writer: the serving process. What is
 * 'by age' is indexed by how many generations ago the page was last put or read; the last entry is of all that are older. */
struct tm_statistics {
    struct tm_histogram put, get, spill, file_read;
    _Atomic uint64_t gets_by_age[TM_GENERATIONS], file_reads_by_age[TM_GENERATIONS];
    _Atomic uint64_t freed_by_age[TM_GENERATIONS]; /* pages, in tmem or in the file, that were overwritten or trimmed */
    _Atomic uint64_t stored_by_age[TM_GENERATIONS]; /* the last survey: bytes of slots */
    _Atomic uint64_t raw_by_age[TM_GENERATIONS];    /* of these, bytes of slots of incompressible pages */
    _Atomic uint64_t filed_by_age[TM_GENERATIONS];  /* the last survey: pages in the file */
    _Atomic uint64_t surveys;
    _Atomic uint64_t generation; /* now: 1 to TM_ANCIENT */
};

_Static_assert(sizeof(struct tm_statistics) <= TM_PAGE, "the statistics do not fit into their page");

/* A word of the control page and its complement: a torn write does not match and is ignored. */
struct tm_checked {
    _Atomic uint64_t value, complement;
};

/* The control page's first words; requests follow (tmemd.store.requests). Writer: whoever controls the pools, another
 * process. */
struct tm_control {
    struct tm_checked target, frozen;
    struct tm_checked demotion_writes; /* pages that demotion may have written to the file, ever; none: no bound */
    struct tm_checked compression;     /* 0: store pages as they are */
};

/* Where the parts of a pool file lie, in bytes. */
struct tm_layout {
    uint64_t pages, blocks;
    uint64_t index_offset, data_offset, data_bytes;
    uint64_t minimum; /* the least limit and target: header, index, and some records */
};

#endif
