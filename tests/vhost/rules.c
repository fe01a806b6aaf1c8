/* SPDX-License-Identifier: BSD-3-Clause */
/* Each rule of the door is broken by itself: the request, the setting or the connection fails as it
 * should, and another front end notices nothing. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>

#include "front.h"

enum { PAGES = 512, SIZE = 16, SECTORS = PAGES * 8 };
enum { OK = 0, IO_ERROR = 1, UNSUPPORTED = 2 };

static struct vhost_config config;
static struct front *other; /* on the same device, always */

static void check_other(void)
{
    static uint8_t version;
    uint8_t *data = front_place(other, 0) + DATA_AT;
    memset(data, ++version, TM_PAGE);
    CHECK(front_do(other, OUT, SECTORS - 8, TM_PAGE) == OK);
    memset(data, 0, TM_PAGE);
    CHECK(front_do(other, IN, SECTORS - 8, TM_PAGE) == OK);
    for (int i = 0; i < TM_PAGE; i++)
        CHECK(data[i] == version);
}

bool __real_tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset);
bool __wrap_tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset);
bool __wrap_tm_may_wait(struct tm_device *device, enum tm_op op, uint64_t count, uint64_t offset)
{
    CHECK(op == TM_FLUSH || (count && offset < device->size && count <= device->size - offset));
    return __real_tm_may_wait(device, op, count, offset);
}

static struct front *begin(void) { return front_begin(&config, VIRTIO_F_INDIRECT, SIZE); }

/* The connection has ended, for this reason. */
static void check_ended(struct front *front, int result, const char *why)
{
    struct pollfd hung = {.fd = front->socket, .events = POLLRDHUP};
    char error[256];
    CHECK(poll(&hung, 1, -1) == 1);
    int returned = front_close(front, error);
    if (returned != result || !strstr(error, why))
        fprintf(stderr, "%d: %s, instead of %d: %s\n", returned, error, result, why);
    CHECK(returned == result && strstr(error, why));
    check_other();
}

/* The front end is still served. */
static void check_served(struct front *front)
{
    CHECK(front_do(front, GET_ID, 0, 20) == OK && front_close(front, NULL) == 0);
    check_other();
}

/* --- Settings --- */

static void test_what_is_no_eventfd_is_no_kick(void)
{
    int ends[2], file = memory_file(TM_PAGE), null = open("/dev/null", O_RDWR | O_CLOEXEC);
    CHECK(pipe(ends) == 0);
    for (int i = 0; i < 3; i++) {
        struct front *front = begin();
        int fd = (int[]){ends[1], file, null}[i];
        CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, 0, fd) == 1);
        /* It does not stay, either: nothing is served until there is one that is. */
        CHECK(front_set_state(front, VHOST_SET_VRING_ENABLE, 0, 1) == 0);
        CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, 0, front->kick[0]) == 0);
        check_served(front);
    }
    struct front *front = begin();
    CHECK(front_set_u64(front, VHOST_SET_VRING_KICK, 0 | VHOST_NO_FD) == 1);
    check_served(front_begin(&config, 0, SIZE));
    front_close(front, NULL);
    close(ends[0]);
    close(ends[1]);
    close(file);
    close(null);
}

static void test_rings_are_powers_of_two(void)
{
    struct front *front = begin();
    for (uint32_t num = 0; num <= 2049; num += num % 3 + 1)
        CHECK(front_set_state(front, VHOST_SET_VRING_NUM, 0, num) ==
              (num == 0 || num > 1024 || (num & (num - 1))));
    CHECK(front_set_state(front, VHOST_SET_VRING_NUM, 0, UINT32_MAX) == 1);
    CHECK(front_set_state(front, VHOST_SET_VRING_NUM, 0, 65536 + SIZE) == 1);
    CHECK(front_set_state(front, VHOST_SET_VRING_NUM, 0, SIZE) == 0);
    check_served(front);
}

static void test_rings_are_aligned_and_in_memory(void)
{
    struct vhost_vring_address right = front_rings(0), wrong[8];
    for (int i = 0; i < 8; i++)
        wrong[i] = right;
    wrong[0].descriptors += 8;
    wrong[1].available += 1;
    wrong[2].used += 2;
    wrong[3].descriptors = USER + HALF - SIZE * 16 + 16; /* over a border of regions */
    wrong[4].available = USER + MEMORY - SIZE * 2;
    wrong[5].used = USER - 8;
    wrong[6].descriptors = 0;
    wrong[7].used = UINT64_MAX - 3;
    for (int i = 0; i < 8; i++) {
        struct front *front = begin();
        CHECK(front_set(front, VHOST_SET_VRING_ADDR, &wrong[i], sizeof right, NULL, 0) == 1);
        CHECK(front_set_address(front, 0) == 0);
        check_served(front);
    }
}

static void test_there_are_sixteen_queues(void)
{
    struct front *front = begin();
    for (uint32_t request = VHOST_SET_VRING_NUM; request <= VHOST_SET_VRING_BASE; request++) {
        struct vhost_vring_address address = {.index = VIRTQUEUES};
        CHECK(front_set(front, request, &address, sizeof address, NULL, 0) == 1);
    }
    for (uint64_t queue = VIRTQUEUES; queue < 256; queue += 239)
        CHECK(front_set_fd(front, VHOST_SET_VRING_CALL, queue, front->fd) == 1);
    check_served(front);
}

/* Set a table of one region; returns as front_set does. */
static int share(struct front *front, struct vhost_region region, int fd)
{
    struct vhost_memory_table table = {.n = 1, .regions = {region}};
    return front_set(front, VHOST_SET_MEM_TABLE, &table, 8 + sizeof region, &fd, 1);
}

static void test_memory_is_files_that_are_long_enough(void)
{
    struct vhost_region right = {GUEST, MEMORY, USER, 0}, wrong[8];
    struct front *front = begin();
    int null = open("/dev/null", O_RDWR | O_CLOEXEC), ends[2], read_only;
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", front->fd);
    CHECK((read_only = open(path, O_RDONLY | O_CLOEXEC)) >= 0 && pipe(ends) == 0);
    for (int i = 0; i < 8; i++)
        wrong[i] = right;
    wrong[0].bytes = 0;
    wrong[1].bytes = MEMORY + 1;
    wrong[2].offset = 1;
    wrong[3].offset = UINT64_MAX - 1;
    wrong[4].bytes = UINT64_MAX;
    wrong[5].guest = UINT64_MAX - MEMORY / 2;
    wrong[6].user = UINT64_MAX - MEMORY / 2;
    wrong[7].guest = INT64_MAX;
    for (int i = 0; i < 8; i++)
        CHECK(share(front, wrong[i], front->fd) == 1);
    for (int i = 0; i < 3; i++)
        CHECK(share(front, right, (int[]){null, ends[0], read_only}[i]) == 1);
    CHECK(share(front, right, front->kick[0]) == 1);
    struct vhost_memory_table table = front_table();
    uint32_t size = 8 + 2 * sizeof *table.regions;
    CHECK(front_set(front, VHOST_SET_MEM_TABLE, &table, size, &front->fd, 1) == 1);
    CHECK(front_set(front, VHOST_SET_MEM_TABLE, &table, size, NULL, 0) == 1);
    CHECK(front_set(front, VHOST_SET_MEM_TABLE, &table, size - 1, (int[]){null, null}, 2) == 1);
    table.n = VHOST_MAX_REGIONS + 1;
    CHECK(front_set(front, VHOST_SET_MEM_TABLE, &table, size, (int[]){null, null}, 2) == 1);
    CHECK(front_share(front) == 0);
    check_served(front);
    close(null);
    close(read_only);
    close(ends[0]);
    close(ends[1]);
}

static void test_a_guest_does_not_take_the_address_space_of_all(void)
{
    struct front *front = begin();
    int fd = memory_file(2 * MEMORY_MAX);
    struct vhost_inflight_area area = {.bytes = MEMORY_MAX, .n_queues = 1, .queue_size = SIZE};
    struct vhost_memory_table table = {
        .n = 2, .regions = {{0, MEMORY_MAX, USER, 0}, {MEMORY_MAX, TM_PAGE, 0, 0}}};
    uint32_t size = 8 + 2 * sizeof *table.regions;
    CHECK(front_set(front, VHOST_SET_MEM_TABLE, &table, size, (int[]){fd, fd}, 2) == 1);
    table.regions[0].bytes += 1;
    CHECK(share(front, table.regions[0], fd) == 1);
    for (int i = 0; i < 16; i++)
        CHECK(front_set(front, VHOST_SET_INFLIGHT_FD, &area, 20, &fd, 1) == 0);
    close(fd);
    front_close(front, NULL);
    check_other();
}

static void test_only_what_was_offered_is_agreed_upon(void)
{
    struct front *front = begin();
    for (int bit = 0; bit < 64; bit++) {
        uint64_t offered = VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH |
                           VIRTIO_BLK_F_TOPOLOGY | VIRTIO_BLK_F_CONFIG_WCE | VIRTIO_BLK_F_MQ |
                           VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES | VIRTIO_F_INDIRECT |
                           VIRTIO_F_EVENT_IDX | VIRTIO_F_VERSION_1 | VHOST_F_PROTOCOL_FEATURES;
        uint64_t features = UINT64_C(1) << bit;
        CHECK(front_set_u64(front, VHOST_SET_FEATURES, features) == !(offered & features));
    }
    CHECK(front_agree(front, VIRTIO_F_INDIRECT) == 0);
    check_served(front);
}

static int set_config(struct front *front, uint32_t offset, uint32_t size, uint32_t sent)
{
    struct vhost_device_config written = {.offset = offset, .size = size};
    return front_set(front, VHOST_SET_CONFIG, &written, sent, NULL, 0);
}

static void test_one_byte_of_the_configuration_is_written(void)
{
    struct front *front = begin();
    enum { HEADER = 12, WRITEBACK = 32 };
    CHECK(set_config(front, WRITEBACK, 1, HEADER + 1) == 1); /* not agreed upon */
    CHECK(front_agree(front, VIRTIO_BLK_F_CONFIG_WCE) == 0);
    CHECK(set_config(front, WRITEBACK, 1, HEADER + 1) == 0);
    CHECK(set_config(front, WRITEBACK, 1, HEADER) == 1);
    CHECK(set_config(front, WRITEBACK, UINT32_MAX, HEADER + 1) == 1);
    CHECK(set_config(front, WRITEBACK, 2, HEADER + 2) == 1);
    CHECK(set_config(front, WRITEBACK + 1, 1, HEADER + 1) == 1);
    CHECK(set_config(front, 0, 0, HEADER) == 1 && set_config(front, 0, 0, 0) == 1);
    check_served(front);
}

static void test_more_of_the_configuration_than_there_is_reads_as_zeros(void)
{
    struct front *front = begin();
    for (uint32_t offset = 0; offset < 300; offset += 59) {
        struct wire wire = {.payload.config = {.offset = offset, .size = VHOST_CONFIG_MAX}};
        CHECK(front_get(front, VHOST_GET_CONFIG, &wire, 12 + VHOST_CONFIG_MAX) == -1);
        CHECK(wire.size == 12 + VHOST_CONFIG_MAX);
        for (uint32_t i = 0; i < VHOST_CONFIG_MAX; i++)
            CHECK(offset + i < 60 || wire.payload.config.bytes[i] == 0);
    }
    struct wire wire = {.payload.config = {.offset = UINT32_MAX, .size = 8}};
    front_get(front, VHOST_GET_CONFIG, &wire, 12);
    CHECK(wire.payload.config.bytes[7] == 0);
    check_served(front);
}

/* --- Messages --- */

/* Send bytes that are wrong, without asking whether they are. */
static void check_message(struct wire wire, size_t length, int result, const char *why)
{
    struct front *front = begin();
    CHECK(front_send_bytes(front, &wire, length, NULL, 0));
    check_ended(front, result, why);
}

static void test_messages_that_are_none_end_the_connection(void)
{
    uint32_t version = VHOST_VERSION;
    check_message((struct wire){VHOST_SET_OWNER, 0, 0, {0}}, 12, EPROTO, "");
    check_message((struct wire){VHOST_SET_OWNER, 2, 0, {0}}, 12, EPROTO, "");
    check_message((struct wire){VHOST_SET_OWNER, version | VHOST_REPLY, 0, {0}}, 12, EPROTO, "");
    check_message((struct wire){VHOST_SET_OWNER, version, 1 << 20, {0}}, 12, EPROTO, "");
    check_message((struct wire){VHOST_SET_OWNER, version, UINT32_MAX, {0}}, 12, EPROTO, "");
    check_message((struct wire){0, version, 0, {0}}, 12, EPROTO, "message 0 is not known");
    check_message((struct wire){99, version, 8, {0}}, 20, EPROTO, "message 99 is not known");
    check_message((struct wire){VHOST_SET_VRING_NUM, version, 7, {0}}, 19, EPROTO, "too short");
    check_message((struct wire){VHOST_SET_VRING_ADDR, version, 8, {0}}, 20, EPROTO, "too short");
    check_message((struct wire){VHOST_GET_CONFIG, version, 4, {0}}, 16, EINVAL, "configuration");
    struct wire large = {VHOST_GET_CONFIG, version, 12, {.config = {.size = 257}}};
    check_message(large, 24, EINVAL, "a configuration of 257 bytes");
}

static void test_descriptors_that_nobody_wants_are_closed(void)
{
    struct front *front = begin();
    int ends[2], fds[64];
    CHECK(pipe(ends) == 0);
    for (unsigned n = 1; n <= 64; n *= 2) {
        struct wire wire = {VHOST_SET_OWNER, VHOST_VERSION, 0, {0}};
        for (unsigned i = 0; i < n; i++)
            fds[i] = ends[1];
        CHECK(front_send(front, &wire, fds, n));
        for (unsigned i = 0; i < WIRE_HEADER; i++) /* one with each byte */
            CHECK(front_send_bytes(front, (uint8_t *)&wire + i, 1, fds, n));
    }
    CHECK(front_set_u64(front, VHOST_SET_OWNER, 0) == 0);
    close(ends[1]);
    CHECK(read(ends[0], fds, 1) == 0); /* nobody holds the other end any more */
    close(ends[0]);
    check_served(front);
}

static _Atomic int impatient = -1; /* where half of a message has taken too long */
static _Atomic bool interrupted;   /* the next wait is, as by a signal */
static _Atomic int patience;       /* of the last wait for a message */

int __real_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    if (fds->fd != atomic_load(&impatient))
        return __real_poll(fds, n, timeout);
    atomic_store(&patience, timeout);
    if (atomic_exchange(&interrupted, false)) {
        errno = EINTR;
        return -1;
    }
    return __real_poll(fds, n, timeout < 0 ? timeout : 0);
}

static void test_half_a_message_is_not_waited_for_for_ever(void)
{
    for (size_t length = 1; length < 20; length++) {
        struct front *front = begin();
        struct wire wire = {VHOST_SET_VRING_NUM, VHOST_VERSION, 8, {0}};
        atomic_store(&impatient, front->served);
        CHECK(front_send_bytes(front, &wire, length, NULL, 0));
        check_ended(front, ETIMEDOUT, "");
        CHECK(atomic_load(&patience) > 0);
        atomic_store(&impatient, -1);
    }
    struct front *front = begin();
    CHECK(front_send_bytes(front, "half", 4, NULL, 0) && shutdown(front->socket, SHUT_WR) == 0);
    check_ended(front, EPROTO, "");
}

static void test_a_signal_makes_nobody_impatient(void)
{
    struct front *front = begin();
    atomic_store(&impatient, front->served);
    atomic_store(&interrupted, true);
    CHECK(front_set_u64(front, VHOST_SET_OWNER, 0) == 0); /* the wait for the next is interrupted */
    while (atomic_load(&interrupted))
        CHECK(front_set_u64(front, VHOST_SET_OWNER, 0) == 0);
    CHECK(front_set_u64(front, VHOST_SET_OWNER, 0) == 0);
    atomic_store(&impatient, -1);
    check_served(front);
}

static void test_who_takes_in_no_replies_is_not_waited_for(void)
{
    struct front *front = begin();
    struct wire wire = {VHOST_GET_FEATURES, VHOST_VERSION, 0, {0}};
    while (front_send(front, &wire, NULL, 0))
        ;
    int result = front_close(front, NULL);
    CHECK(result == EAGAIN || result == EPROTO);
    check_other();
}

/* --- Chains --- */

static struct descriptor part(size_t at, uint32_t length, uint16_t flags, uint16_t next)
{
    return (struct descriptor){GUEST + PLACES + at, length, flags, next};
}

#define HEADER_PART(flags, next) part(HEADER_AT, 16, flags, next)
#define DATA_PART(flags, next) part(DATA_AT, 20, flags, next)
#define STATUS_PART(flags, next) part(STATUS_AT, 1, flags, next)

/* Offer a chain of these descriptors from 0 on, of which the first is the head. */
static void offer(struct front *front, const struct descriptor *descriptors, unsigned n)
{
    front_describe(front, 0, 0, GET_ID, 0, 20); /* a header, and a status that is not there yet */
    memcpy(front_descriptors(front, 0), descriptors, n * sizeof *descriptors);
    front_descriptors(front, 0)[SIZE] = STATUS_PART(WRITE, 0); /* behind the table */
    front_offer(front, 0, 0);
}

#define CHECK_DAMAGED(...)                                                                         \
    do {                                                                                           \
        struct front *front = begin();                                                             \
        struct descriptor descriptors[] = {__VA_ARGS__};                                           \
        offer(front, descriptors, sizeof descriptors / sizeof *descriptors);                       \
        check_ended(front, EPROTO, "its queue or its memory is damaged");                          \
    } while (0)

#define CHECK_STATUS(expected, ...)                                                                \
    do {                                                                                           \
        struct front *front = begin();                                                             \
        struct descriptor descriptors[] = {__VA_ARGS__};                                           \
        offer(front, descriptors, sizeof descriptors / sizeof *descriptors);                       \
        CHECK(front_wait(front, 0, 1) && front_place(front, 0)[STATUS_AT] == (expected));          \
        check_served(front);                                                                       \
    } while (0)

static void test_chains_that_break_the_rules(void)
{
    CHECK_STATUS(OK, HEADER_PART(NEXT, 1), DATA_PART(NEXT | WRITE, 2), STATUS_PART(WRITE, 0));
    /* Loops. */
    CHECK_DAMAGED(HEADER_PART(NEXT, 0));
    CHECK_DAMAGED(part(HEADER_AT, 0, NEXT, 0));
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), DATA_PART(NEXT | WRITE, 2), STATUS_PART(NEXT | WRITE, 1));
    /* Out of the table. */
    CHECK_DAMAGED(HEADER_PART(NEXT, SIZE));
    CHECK_DAMAGED(HEADER_PART(NEXT, UINT16_MAX));
    /* No place for a status. */
    CHECK_DAMAGED(HEADER_PART(0, 0));
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), DATA_PART(0, 0));
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), part(STATUS_AT, 0, WRITE, 0));
    CHECK_DAMAGED({0, 0, 0, 0});
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), {0, 1, WRITE, 0});
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), {GUEST + MEMORY, 1, WRITE, 0});
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), {GUEST + MEMORY - 1, 2, WRITE, 0});
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), {UINT64_MAX, 1, WRITE, 0});
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), {GUEST - 1, UINT32_MAX, WRITE, 0});
    /* What the guest reads before what it writes. */
    CHECK_DAMAGED(DATA_PART(NEXT | WRITE, 1), HEADER_PART(NEXT, 2), STATUS_PART(WRITE, 0));
    CHECK_DAMAGED(HEADER_PART(NEXT, 1), STATUS_PART(NEXT | WRITE, 2), DATA_PART(0, 0));
}

static void test_requests_that_cannot_be_done_fail(void)
{
    /* Data that is no memory, while the status is. */
    CHECK_STATUS(IO_ERROR, HEADER_PART(NEXT, 1), {0, 20, NEXT | WRITE, 2}, STATUS_PART(WRITE, 0));
    CHECK_STATUS(IO_ERROR, HEADER_PART(NEXT, 1), {UINT64_MAX - 7, 8, NEXT | WRITE, 2},
                 STATUS_PART(WRITE, 0));
    CHECK_STATUS(IO_ERROR, {GUEST - 8, 16, NEXT, 1}, STATUS_PART(WRITE, 0));
    /* Half of a header, or none. */
    CHECK_STATUS(IO_ERROR, part(HEADER_AT, 15, NEXT, 1), STATUS_PART(WRITE, 0));
    CHECK_STATUS(IO_ERROR, STATUS_PART(WRITE, 0));
    /* A header in pieces, over the border of the regions and with nothing in between, is one. */
    CHECK_STATUS(OK, part(HEADER_AT, 3, NEXT, 1), part(0, 0, NEXT, 2),
                 part(HEADER_AT + 3, 13, NEXT, 3), STATUS_PART(WRITE, 0));
}

static void test_sectors_that_the_device_lacks(void)
{
    struct front *front = begin();
    for (uint32_t type = IN; type <= OUT; type++) {
        CHECK(front_do(front, type, SECTORS - 1, 512) == OK);
        CHECK(front_do(front, type, SECTORS, 0) == OK);
        CHECK(front_do(front, type, SECTORS, 512) == IO_ERROR);
        CHECK(front_do(front, type, SECTORS - 1, 1024) == IO_ERROR);
        CHECK(front_do(front, type, SECTORS + 1, 0) == IO_ERROR);
        CHECK(front_do(front, type, UINT64_MAX, 512) == IO_ERROR);
        CHECK(front_do(front, type, UINT64_MAX / 512 + 1, 512) == IO_ERROR);
        CHECK(front_do(front, type, 0, 511) == IO_ERROR);
    }
    for (uint32_t type = 0; type < 40; type++) {
        bool is_known = type <= OUT || type == FLUSH || type == GET_ID || type == DISCARD ||
                        type == WRITE_ZEROES;
        CHECK(is_known || front_do(front, type, 0, 512) == UNSUPPORTED);
    }
    check_served(front);
}

/* A discard or write-zeroes of n equal ranges, in so many bytes. */
static uint8_t do_ranges(struct front *front, uint32_t type, struct range range, unsigned n,
                         uint32_t bytes)
{
    for (unsigned i = 0; i < n; i++)
        memcpy(front_place(front, 0) + DATA_AT + i * sizeof range, &range, sizeof range);
    return front_do(front, type, 0, bytes);
}

static void test_ranges_are_checked_one_by_one(void)
{
    struct front *front = begin();
    for (uint32_t type = DISCARD; type <= WRITE_ZEROES; type += WRITE_ZEROES - DISCARD) {
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 1, 16) == OK);
        CHECK(do_ranges(front, type, (struct range){SECTORS, 0, 0}, 16, 256) == OK);
        CHECK(do_ranges(front, type, (struct range){SECTORS - 8, 8, 0}, 16, 256) == OK);
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 17, 272) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 1, 15) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 2, 17) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 0, 0) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){SECTORS - 7, 8, 0}, 1, 16) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){UINT64_MAX, 8, 0}, 1, 16) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){0, UINT32_MAX, 0}, 1, 16) == IO_ERROR);
        CHECK(do_ranges(front, type, (struct range){0, 8, 1}, 1, 16) ==
              (type == DISCARD ? UNSUPPORTED : OK));
        CHECK(do_ranges(front, type, (struct range){0, 8, 2}, 1, 16) == UNSUPPORTED);
    }
    check_served(front);
}

static void test_a_read_only_device_is_not_written(void)
{
    struct vhost_config read_only = config;
    read_only.read_only = true;
    struct front *front = front_begin(&read_only, 0, SIZE);
    CHECK(front_do(front, OUT, 0, 512) == IO_ERROR);
    for (uint32_t type = DISCARD; type <= WRITE_ZEROES; type += WRITE_ZEROES - DISCARD)
        CHECK(do_ranges(front, type, (struct range){0, 8, 0}, 1, 16) == IO_ERROR);
    CHECK(front_do(front, IN, 0, 512) == OK);
    check_served(front);
}

/* --- Indirect tables --- */

enum { TABLE_AT = 64 << 10 };

/* Offer descriptors that lie in a table of their own at `at` of the memory, told of by `pointer`.
 */
static void offer_table(struct front *front, size_t at, const struct descriptor *descriptors,
                        unsigned n, struct descriptor pointer)
{
    front_describe(front, 0, 0, GET_ID, 0, 20);
    memcpy(front->memory + at, descriptors, n * sizeof *descriptors);
    pointer.address = pointer.address ? pointer.address : GUEST + at;
    front_descriptors(front, 0)[0] = pointer;
    front_offer(front, 0, 0);
}

static void test_indirect_tables(void)
{
    struct front *front = begin();
    struct descriptor table[1024];
    /* Of any length, in one region or two, where the border may be within a descriptor. */
    for (uint16_t n = 2; n <= 1024; n += 511)
        for (size_t before = 0; before < 2 * sizeof *table; before += 7) {
            for (uint16_t i = 0; i < n; i++)
                table[i] = part(HEADER_AT, i ? 0 : 16, NEXT, i + 1);
            table[n - 1] = STATUS_PART(WRITE, 0);
            offer_table(front, HALF - before, table, n,
                        (struct descriptor){0, n * sizeof *table, INDIRECT, 0});
            CHECK(front_wait(front, 0, 1) && front_place(front, 0)[STATUS_AT] == OK);
        }
    check_served(front);
    static const struct {
        struct descriptor pointer;
        uint16_t flags; /* of what lies in the table */
    } wrong[] = {
        {{0, 16, INDIRECT | NEXT, 1}, WRITE},           /* not the last */
        {{0, 0, INDIRECT, 0}, WRITE},                   /* empty */
        {{0, 15, INDIRECT, 0}, WRITE},                  /* of half a descriptor */
        {{0, 40, INDIRECT, 0}, WRITE},                  /* of two and a half */
        {{0, 1025 * 16, INDIRECT, 0}, WRITE},           /* too large */
        {{0, UINT32_MAX - 15, INDIRECT, 0}, WRITE},     /* far too large */
        {{GUEST - 16, 32, INDIRECT, 0}, WRITE},         /* no memory */
        {{GUEST + MEMORY - 8, 16, INDIRECT, 0}, WRITE}, /* partly none */
        {{UINT64_MAX - 15, 16, INDIRECT, 0}, WRITE},    /* around the end */
        {{0, 16, INDIRECT, 0}, NEXT},                   /* goes on where it ends */
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        front = begin();
        table[0] = part(STATUS_AT, 16, wrong[i].flags, 1);
        offer_table(front, TABLE_AT, table, 1, wrong[i].pointer);
        check_ended(front, EPROTO, "damaged");
    }
    /* Nested. */
    front = begin();
    table[0] = (struct descriptor){GUEST + TABLE_AT + sizeof *table, sizeof *table, INDIRECT, 0};
    table[1] = STATUS_PART(WRITE, 0);
    offer_table(front, TABLE_AT, table, 2, (struct descriptor){0, sizeof *table, INDIRECT, 0});
    check_ended(front, EPROTO, "damaged");
    /* Not agreed upon. */
    front = front_begin(&config, 0, SIZE);
    table[0] = STATUS_PART(WRITE, 0);
    offer_table(front, TABLE_AT, table, 1, (struct descriptor){0, 16, INDIRECT, 0});
    check_ended(front, EPROTO, "damaged");
}

/* A chain of so many descriptors in one region, and so many that each lie in two. */
static struct front *offer_parts(uint16_t n_single, uint16_t n_double)
{
    struct front *front = begin();
    struct descriptor table[1024];
    uint16_t n = n_double + n_single;
    for (uint16_t i = 0; i < n; i++)
        table[i] = (struct descriptor){GUEST + HALF - (i >= n_single), 2, NEXT | WRITE, i + 1};
    table[n] = STATUS_PART(WRITE, 0);
    offer_table(front, TABLE_AT, table, n + 1,
                (struct descriptor){0, (n + UINT32_C(1)) * sizeof *table, INDIRECT, 0});
    return front;
}

static void test_a_request_has_so_many_parts_and_no_more(void)
{
    enum { ROOM = VIRTQUEUE_SEGMENTS - 1 }; /* without the status */
    struct front *front = offer_parts(1, ROOM / 2);
    CHECK(front_wait(front, 0, 1) && front_place(front, 0)[STATUS_AT] == IO_ERROR);
    check_served(front);
    front = offer_parts(1, ROOM / 2 + 100); /* those that are too many are no memory */
    CHECK(front_wait(front, 0, 1) && front_place(front, 0)[STATUS_AT] == IO_ERROR);
    check_served(front);
    check_ended(offer_parts(2, ROOM / 2), EPROTO, "damaged");
    check_ended(offer_parts(0, ROOM / 2 + 100), EPROTO, "damaged");
}

static void test_the_index_and_the_heads_stay_in_the_ring(void)
{
    for (uint16_t head = SIZE; head; head *= 2) {
        struct front *front = begin();
        front_descriptors(front, 0)[head] = STATUS_PART(WRITE, 0);
        front_offer(front, 0, head);
        check_ended(front, EPROTO, "damaged");
    }
    for (uint32_t jump = SIZE + 1; jump <= UINT16_MAX; jump = 2 * jump + 1) {
        struct front *front = begin();
        front_describe(front, 0, 0, GET_ID, 0, 20); /* which all of the ring tells of */
        __atomic_store_n(&front_available(front, 0)->index, (uint16_t)jump, __ATOMIC_RELEASE);
        front_kick(front, 0);
        check_ended(front, EPROTO, "damaged");
    }
}

/* --- Memory that goes --- */

static void test_truncated_memory_ends_one_connection(void)
{
    for (off_t left = 0; left < MEMORY;
         left += HALF) { /* the rings go, or only what is asked for */
        struct front *front = begin();
        CHECK(front_do(front, IN, 0, TM_PAGE) == OK);
        front_describe(front, 0, 0, IN, 0, TM_PAGE);
        if (left) {
            front_available(front, 0)->ring[front_available(front, 0)->index % SIZE] = 0;
            __atomic_fetch_add(&front_available(front, 0)->index, 1, __ATOMIC_RELEASE);
        }
        CHECK(ftruncate(front->fd, left) == 0);
        front_kick(front, 0);
        check_ended(front, EPROTO, "its queue or its memory is damaged");
    }
}

static void test_a_truncated_inflight_area_ends_nothing(void)
{
    struct front *front = begin();
    int fd = memory_file(1 << 20);
    struct vhost_inflight_area area = {.bytes = 1 << 20, .n_queues = 1, .queue_size = SIZE};
    CHECK(front_set(front, VHOST_SET_INFLIGHT_FD, &area, 20, &fd, 1) == 0);
    CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, 0, front->kick[0]) == 0);
    CHECK(front_do(front, GET_ID, 0, 20) == OK && ftruncate(fd, 0) == 0);
    for (int i = 0; i < 3; i++)
        CHECK(front_do(front, GET_ID, 0, 20) == OK);
    close(fd);
    check_served(front);
}

/* --- Interrupts --- */

static void test_a_call_that_takes_nothing_in_stops_nobody(void)
{
    int ends[2], flags;
    CHECK(pipe(ends) == 0);
    flags = fcntl(ends[1], F_GETFL);
    CHECK(fcntl(ends[1], F_SETFL, flags | O_NONBLOCK) == 0);
    while (write(ends[1], "x", 1) == 1)
        ;
    CHECK(fcntl(ends[1], F_SETFL, flags) == 0);
    struct front *front = begin();
    CHECK(front_set_fd(front, VHOST_SET_VRING_CALL, 0, ends[1]) == 0);
    CHECK(front_set_fd(front, VHOST_SET_VRING_ERR, 0, ends[1]) == 0);
    for (uint16_t head = 0; head < SIZE - 3; head += 3) {
        front_describe(front, 0, head, GET_ID, 0, 20);
        front_offer(front, 0, head);
    }
    while (front_used_index(front, 0) < SIZE / 3)
        sched_yield();
    front->seen[0] = SIZE / 3;
    close(ends[0]); /* nor one that nobody can read any more */
    front_describe(front, 0, 0, GET_ID, 0, 20);
    front_offer(front, 0, 0);
    while (front_used_index(front, 0) == front->seen[0])
        sched_yield();
    CHECK(front_set_fd(front, VHOST_SET_VRING_CALL, 0, front->call[0]) == 0);
    CHECK(front_wait(front, 0, 1));
    close(ends[1]);
    check_served(front);
}

/* Who is told that the queue is damaged, and waits for being replaced meanwhile. */
static _Atomic bool is_watched;

ssize_t write(int fd, const void *bytes, size_t length)
{
    if (atomic_exchange(&is_watched, false))
        for (int i = 0; i < 10000; i++, sched_yield())
            CHECK(fcntl(fd, F_GETFD) >= 0); /* else what is written to is anybody's */
    return syscall(SYS_write, fd, bytes, length);
}

static void test_a_descriptor_is_not_closed_while_it_is_written_to(void)
{
    struct front *front = begin();
    CHECK(front_set_fd(front, VHOST_SET_VRING_ERR, 0, front->call[0]) == 0);
    atomic_store(&is_watched, true);
    __atomic_store_n(&front_available(front, 0)->index, SIZE + 1, __ATOMIC_RELEASE);
    CHECK(syscall(SYS_write, front->kick[0], &(uint64_t){1}, 8) == 8);
    while (atomic_load(&is_watched))
        sched_yield();
    struct wire wire = {VHOST_SET_VRING_ERR, VHOST_VERSION, 8, {0}};
    front_send(front, &wire, &front->call[0], 1);
    check_ended(front, EPROTO, "damaged");
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    struct tm_config device = config_of(PAGES, 1 << 20);
    config = (struct vhost_config){.device = open_device(&device),
                                   .serial = "rules",
                                   .size = device.size,
                                   .block_bytes = TM_PAGE};
    other = begin();
    test_what_is_no_eventfd_is_no_kick();
    test_rings_are_powers_of_two();
    test_rings_are_aligned_and_in_memory();
    test_there_are_sixteen_queues();
    test_memory_is_files_that_are_long_enough();
    test_a_guest_does_not_take_the_address_space_of_all();
    test_only_what_was_offered_is_agreed_upon();
    test_one_byte_of_the_configuration_is_written();
    test_more_of_the_configuration_than_there_is_reads_as_zeros();
    test_messages_that_are_none_end_the_connection();
    test_descriptors_that_nobody_wants_are_closed();
    test_half_a_message_is_not_waited_for_for_ever();
    test_a_signal_makes_nobody_impatient();
    test_who_takes_in_no_replies_is_not_waited_for();
    test_chains_that_break_the_rules();
    test_requests_that_cannot_be_done_fail();
    test_sectors_that_the_device_lacks();
    test_ranges_are_checked_one_by_one();
    test_a_read_only_device_is_not_written();
    test_indirect_tables();
    test_a_request_has_so_many_parts_and_no_more();
    test_the_index_and_the_heads_stay_in_the_ring();
    test_truncated_memory_ends_one_connection();
    test_a_truncated_inflight_area_ends_nothing();
    test_a_call_that_takes_nothing_in_stops_nobody();
    test_a_descriptor_is_not_closed_while_it_is_written_to();
    front_close(other, NULL);
    tm_close(config.device);
    puts("ok");
    return 0;
}
