/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "block.h"

#include <string.h>

enum { SECTOR = 512, SERIAL_BYTES = 20 };

/* virtio 5.2.6 */
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13 };
enum { STATUS_OK = 0, STATUS_IOERR = 1, STATUS_UNSUPPORTED = 2 };
enum { UNMAP = 1 };

/* Linux asks for at most so many segments, a header and a status; its rings hold 128 or more. */
enum { SEG_MAX = 126 };
/* One range of a discard or write-zeroes: 128 MiB. */
enum { RANGE_SECTORS = 262144 };

struct header {
    uint32_t type, reserved;
    uint64_t sector;
};

struct range {
    uint64_t sector;
    uint32_t n_sectors, flags;
};

/* virtio 5.2.4 */
struct configuration {
    uint64_t capacity;
    uint32_t size_max, seg_max;
    uint16_t cylinders;
    uint8_t heads, sectors;
    uint32_t blk_size;
    uint8_t physical_block_exp, alignment_offset;
    uint16_t min_io_size;
    uint32_t opt_io_size;
    uint8_t writeback, unused0;
    uint16_t num_queues;
    uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
    uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
    uint8_t write_zeroes_may_unmap, unused1[3];
};
_Static_assert(sizeof(struct configuration) == 64, "60 bytes, and padding at the end");
enum { CONFIGURATION_BYTES = 60 };

uint64_t block_features(const struct vhost_config *config)
{
    uint64_t writable = VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_CONFIG_WCE | VIRTIO_BLK_F_DISCARD |
                        VIRTIO_BLK_F_WRITE_ZEROES;
    return VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_TOPOLOGY | VIRTIO_BLK_F_MQ |
           (config->read_only ? VIRTIO_BLK_F_RO : writable);
}

void block_config(const struct vhost_config *config, bool write_back, uint32_t offset, uint8_t *to,
                  uint32_t size)
{
    uint32_t page_blocks = TM_PAGE / config->block_bytes;
    struct configuration all = {.capacity = config->size / SECTOR,
                                .seg_max = SEG_MAX,
                                .blk_size = config->block_bytes,
                                .physical_block_exp = (uint8_t)__builtin_ctz(page_blocks),
                                .min_io_size = (uint16_t)page_blocks,
                                .opt_io_size = page_blocks,
                                .writeback = write_back,
                                .num_queues = VIRTQUEUES,
                                .max_discard_sectors = RANGE_SECTORS,
                                .max_discard_seg = BLOCK_RANGES,
                                .discard_sector_alignment = TM_PAGE / SECTOR,
                                .max_write_zeroes_sectors = RANGE_SECTORS,
                                .max_write_zeroes_seg = BLOCK_RANGES,
                                .write_zeroes_may_unmap = 1};
    memset(to, 0, size);
    if (offset < CONFIGURATION_BYTES) {
        uint32_t left = CONFIGURATION_BYTES - offset;
        memcpy(to, (uint8_t *)&all + offset, size < left ? size : left);
    }
}

bool block_is_write_back_byte(uint32_t offset, uint32_t size)
{
    return offset == offsetof(struct configuration, writeback) && size == 1;
}

static uint64_t length_of(const struct parts *parts)
{
    uint64_t length = 0;
    for (unsigned i = 0; i < parts->n; i++)
        length += parts->at[i].iov_len;
    return length;
}

/* Copy up to `count` bytes out of the guest's memory, or into it. Returns how many; the parts begin
 * behind them then. */
static uint32_t transfer(struct parts *parts, uint8_t *buffer, uint32_t count, bool to_guest)
{
    uint32_t done = 0;
    while (done < count && parts->n) {
        struct iovec *part = parts->at;
        uint32_t left = count - done,
                 length = part->iov_len < left ? (uint32_t)part->iov_len : left;
        if (to_guest)
            memcpy(part->iov_base, buffer + done, length);
        else
            memcpy(buffer + done, part->iov_base, length);
        part->iov_base = (uint8_t *)part->iov_base + length;
        part->iov_len -= length;
        done += length;
        if (!part->iov_len) {
            parts->at++;
            parts->n--;
        }
    }
    return done;
}

static bool is_within(const struct vhost_config *config, uint64_t sector, uint64_t bytes)
{
    return bytes % SECTOR == 0 && sector <= config->size / SECTOR &&
           bytes <= config->size - sector * SECTOR;
}

static uint32_t parse_data(const struct vhost_config *config, uint64_t sector,
                           struct block_request *request)
{
    uint64_t count = length_of(request->op == TM_READ ? &request->in : &request->out);
    if (!is_within(config, sector, count))
        return STATUS_IOERR;
    request->offset = sector * SECTOR;
    request->count = count;
    return STATUS_OK;
}

/* virtio 5.2.6.2: a discard may say nothing of unmapping, and nobody what is not known. */
static uint32_t parse_ranges(const struct vhost_config *config, struct block_request *request)
{
    uint32_t known = request->op == TM_ZERO_RANGE ? UNMAP : 0;
    struct range ranges[BLOCK_RANGES];
    uint64_t bytes = length_of(&request->out);
    if (!bytes || bytes % sizeof *ranges || bytes > sizeof ranges)
        return STATUS_IOERR;
    transfer(&request->out, (uint8_t *)ranges, (uint32_t)bytes, false);
    for (; request->n_ranges < bytes / sizeof *ranges; request->n_ranges++) {
        const struct range *range = &ranges[request->n_ranges];
        uint64_t count = (uint64_t)range->n_sectors * SECTOR;
        if (range->flags & ~known)
            return STATUS_UNSUPPORTED;
        if (!is_within(config, range->sector, count) || range->n_sectors > RANGE_SECTORS)
            return STATUS_IOERR;
        request->ranges[request->n_ranges] = (struct block_range){range->sector * SECTOR, count};
    }
    return STATUS_OK;
}

static uint32_t parse(const struct vhost_config *config, const struct header *header,
                      struct block_request *request)
{
    switch (header->type) {
    case IN:
        request->op = TM_READ;
        return parse_data(config, header->sector, request);
    case OUT:
        request->op = TM_WRITE;
        return config->read_only ? STATUS_IOERR : parse_data(config, header->sector, request);
    case FLUSH:
        request->op = TM_FLUSH;
        return STATUS_OK;
    case GET_ID:
        request->op = TM_READ;
        request->is_get_id = true;
        return STATUS_OK;
    case DISCARD:
    case WRITE_ZEROES:
        request->op = header->type == DISCARD ? TM_TRIM : TM_ZERO_RANGE;
        return config->read_only ? STATUS_IOERR : parse_ranges(config, request);
    default:
        return STATUS_UNSUPPORTED;
    }
}

bool block_parse(const struct vhost_config *config, struct chain *chain,
                 struct block_request *request)
{
    struct header header;
    *request = (struct block_request){.out = {chain->parts, chain->n_out},
                                      .in = {chain->parts + chain->n_out, chain->n_in}};
    if (!chain->n_in)
        return false;
    struct iovec *last = &request->in.at[chain->n_in - 1];
    request->answer = (uint8_t *)last->iov_base + --last->iov_len;
    request->in.n -= !last->iov_len;
    bool whole = transfer(&request->out, (uint8_t *)&header, sizeof header, false) == sizeof header;
    request->failed =
        whole && !chain->is_bad ? parse(config, &header, request) : (uint32_t)STATUS_IOERR;
    return true;
}

static bool may_wait(const struct vhost_config *config, enum tm_op op, uint64_t count,
                     uint64_t offset)
{
    return (count || op == TM_FLUSH) && tm_may_wait(config->device, op, count, offset);
}

bool block_may_wait(const struct vhost_config *config, const struct block_request *request)
{
    if (request->failed)
        return false;
    bool may = !request->n_ranges && may_wait(config, request->op, request->count, request->offset);
    for (unsigned i = 0; i < request->n_ranges && !may; i++)
        may = may_wait(config, request->op, request->ranges[i].count, request->ranges[i].offset);
    return may;
}

static int do_data(const struct vhost_config *config, struct block_request *request,
                   uint8_t *buffer)
{
    int error = 0;
    while (request->count && !error) {
        /* Pieces end where pages do. */
        uint32_t most = BLOCK_BUFFER - (uint32_t)(request->offset % TM_PAGE),
                 n = request->count < most ? (uint32_t)request->count : most;
        if (request->op == TM_WRITE) {
            transfer(&request->out, buffer, n, false);
            error = tm_write(config->device, buffer, n, request->offset, false);
        } else {
            error = tm_read(config->device, buffer, n, request->offset);
            request->written += error ? 0 : transfer(&request->in, buffer, n, true);
        }
        request->offset += n;
        request->count -= n;
    }
    return error;
}

static int do_ranges(const struct vhost_config *config, const struct block_request *request)
{
    int error = 0;
    for (unsigned i = 0; i < request->n_ranges && !error; i++) {
        const struct block_range *range = &request->ranges[i];
        error = (request->op == TM_TRIM ? tm_trim : tm_zero)(config->device, range->count,
                                                             range->offset, false);
    }
    return error;
}

static void do_get_id(const struct vhost_config *config, struct block_request *request)
{
    uint8_t serial[SERIAL_BYTES] = {0};
    memcpy(serial, config->serial, strnlen(config->serial, sizeof serial));
    request->written = transfer(&request->in, serial, sizeof serial, true);
}

static int execute(const struct vhost_config *config, struct block_request *request,
                   uint8_t *buffer)
{
    if (request->is_get_id)
        do_get_id(config, request);
    else if (request->op == TM_FLUSH)
        return tm_flush(config->device);
    else if (request->op == TM_READ || request->op == TM_WRITE)
        return do_data(config, request, buffer);
    return do_ranges(config, request);
}

void block_execute(const struct vhost_config *config, struct block_request *request,
                   uint8_t *buffer, bool sync)
{
    if (!request->failed && execute(config, request, buffer))
        request->failed = STATUS_IOERR;
    if (!request->failed && sync && request->op != TM_READ && request->op != TM_FLUSH &&
        tm_flush(config->device))
        request->failed = STATUS_IOERR;
    *request->answer = (uint8_t)request->failed;
    request->written++;
}
