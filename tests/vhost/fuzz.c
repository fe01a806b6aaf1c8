/* SPDX-License-Identifier: BSD-3-Clause */
/* Hostile front ends and guests, made from seeds: settings, messages, descriptors and rings that
 * are mostly right, so that much is reached, and now and then are anything. Others with the same
 * device notice nothing.
 *
 * usage: fuzz COUNT SEED quiet|scribble [tell]
 *
 * COUNT messages and requests are sent in connections of some hundred each; scribble: a thread
 * changes the guest's memory all the time. The first connection is made from SEED; when something
 * is wrong, that of the connection is told: 'fuzz 1 SEED MODE' is that one alone. Exit status 0 and
 * 'ok'. */
#define _GNU_SOURCE
#include <dirent.h>
#include <sched.h>
#include <signal.h>

#include "front.h"

enum { PAGES = 1024, THEIRS = PAGES / 2, DEVICES = 3 };

/* Of the guest's memory behind its rings: headers and statuses, ranges, indirect tables, data. */
enum { HEADERS = 1 << 20, RANGES = HEADERS + (64 << 10), TABLES = RANGES + (64 << 10) };
enum { DATA = TABLES + (128 << 10), SLOTS = 128, MAX_PARTS = 12 };

static struct victim {
    struct tm_config disk;
    struct vhost_config config; /* for the hostile: the first half of the device */
    struct front *honest;
    uint8_t versions[PAGES - THEIRS];
} victims[DEVICES];

static uint64_t state, session_seed, count, n_sessions, n_clean;
static int strange[8]; /* descriptors of many kinds */

static struct {
    struct front *front;
    _Atomic bool lost;
    unsigned n_queues, n_slots;
    uint16_t size;
    bool has_indirect;
    uint8_t *inflight;
    uint64_t inflight_bytes;
} now;

/* --- Chance --- */

static uint64_t rnd(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * UINT64_C(0x2545f4914f6cdd1d);
}

static uint64_t below(uint64_t n) { return (rnd() >> 20) % n; }
static bool one_in(uint64_t n) { return below(n) == 0; }

static uint64_t any_number(uint64_t near)
{
    static const uint64_t known[] = {0,
                                     1,
                                     2,
                                     3,
                                     7,
                                     8,
                                     15,
                                     16,
                                     17,
                                     255,
                                     256,
                                     511,
                                     512,
                                     513,
                                     1024,
                                     4095,
                                     4096,
                                     65535,
                                     65536,
                                     INT32_MAX,
                                     UINT32_MAX,
                                     UINT32_MAX - 15,
                                     UINT64_C(1) << 32,
                                     INT64_MAX,
                                     UINT64_MAX,
                                     UINT64_MAX - 15,
                                     UINT64_MAX / 512,
                                     GUEST,
                                     GUEST - 1,
                                     GUEST + HALF,
                                     GUEST + HALF - 8,
                                     GUEST + MEMORY,
                                     GUEST + MEMORY - 1,
                                     USER,
                                     USER - 8,
                                     USER + HALF,
                                     USER + HALF - 16,
                                     USER + MEMORY,
                                     THEIRS * 8,
                                     THEIRS * 8 - 1,
                                     PAGES * 8};
    switch (below(4)) {
    case 0:
        return known[below(sizeof known / sizeof *known)];
    case 1:
        return near + below(64) - 32;
    case 2:
        return near ^ UINT64_C(1) << below(64);
    default:
        return rnd() >> below(64);
    }
}

/* Change a few bytes of something. */
static void damage(void *at, size_t bytes)
{
    uint64_t word = 0;
    size_t length = (size_t)1 << below(4), place = below(bytes);
    length = length < bytes - place ? length : bytes - place;
    memcpy(&word, (uint8_t *)at + place, length);
    word = any_number(word);
    memcpy((uint8_t *)at + place, &word, length);
}

/* --- Who must notice nothing --- */

static void check_honest(struct victim *victim)
{
    uint32_t page = (uint32_t)below(PAGES - THEIRS);
    uint8_t *version = &victim->versions[page], *data = front_place(victim->honest, 0) + DATA_AT;
    uint64_t sector = (THEIRS + page) * UINT64_C(8);
    CHECK(front_do(victim->honest, IN, sector, TM_PAGE) == 0);
    for (int i = 0; i < TM_PAGE; i++)
        CHECK(data[i] == *version);
    memset(data, ++*version, TM_PAGE);
    CHECK(front_do(victim->honest, OUT, sector, TM_PAGE) == 0);
}

/* --- The thread that changes the memory --- */

static pthread_mutex_t scribbling = PTHREAD_MUTEX_INITIALIZER;
static uint8_t *_Atomic scribbled; /* the memory, under the mutex */
static _Atomic bool finished;

static void *scribble(void *seed)
{
    uint64_t own = *(uint64_t *)seed;
    while (!atomic_load(&finished)) {
        pthread_mutex_lock(&scribbling);
        uint8_t *memory = atomic_load(&scribbled);
        for (int i = 0; memory && i < 8; i++) {
            own = own * UINT64_C(6364136223846793005) + 1442695040888963407;
            uint64_t chance = own >> 33, at = chance % 4 ? chance % (1 << 14) : chance % DATA;
            /* Mostly of headers and tables, whose every value is a request of some kind. */
            at += chance % 16 ? HEADERS : 0;
            memory[at % MEMORY] = (uint8_t)(own >> 24);
        }
        pthread_mutex_unlock(&scribbling);
        sched_yield();
    }
    return NULL;
}

static void scribble_on(uint8_t *memory)
{
    pthread_mutex_lock(&scribbling);
    atomic_store(&scribbled, memory);
    pthread_mutex_unlock(&scribbling);
}

/* --- Messages --- */

int __real_poll(struct pollfd *fds, nfds_t n, int timeout);
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout);
/* Nobody waits seconds for the rest of a message here. */
int __wrap_poll(struct pollfd *fds, nfds_t n, int timeout)
{
    return __real_poll(fds, n, timeout > 0 ? 1 : timeout);
}

/* Take in what has come, closing descriptors. Returns whether the connection stands. */
static bool drain(int flags)
{
    static uint8_t bytes[4096];
    union {
        char bytes[CMSG_SPACE(8 * sizeof(int))];
        struct cmsghdr align;
    } control;
    for (;; flags = MSG_DONTWAIT) {
        struct iovec iov = {bytes, sizeof bytes};
        struct msghdr message = {.msg_iov = &iov,
                                 .msg_iovlen = 1,
                                 .msg_control = control.bytes,
                                 .msg_controllen = sizeof control.bytes};
        ssize_t got = recvmsg(now.front->socket, &message, flags | MSG_CMSG_CLOEXEC);
        if (got <= 0)
            return got < 0 && errno == EAGAIN;
        int fd = -1;
        if (CMSG_FIRSTHDR(&message)) {
            memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
            /* Only inflight areas come. */
            struct wire *wire = (struct wire *)bytes;
            void *area =
                mmap(NULL, wire->payload.inflight.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
            if (now.inflight)
                munmap(now.inflight, now.inflight_bytes);
            now.inflight = area == MAP_FAILED ? NULL : area;
            now.inflight_bytes = wire->payload.inflight.bytes;
            close(fd);
        }
    }
}

static uint64_t some_features(void)
{
    uint64_t features = VIRTIO_F_VERSION_1 | VHOST_F_PROTOCOL_FEATURES | VIRTIO_BLK_F_CONFIG_WCE;
    features |= one_in(2) ? VIRTIO_BLK_F_FLUSH : 0;
    features |= one_in(2) ? VIRTIO_F_EVENT_IDX : 0;
    now.has_indirect = !one_in(4);
    return features | (now.has_indirect ? VIRTIO_F_INDIRECT : 0);
}

static int *queue_fd(int *fds, unsigned queue)
{
    if (fds[queue] < 0)
        fds[queue] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return &fds[queue];
}

/* A right message: its payload and descriptors. Returns how many of them. */
static unsigned make(struct wire *wire, uint32_t request, uint32_t queue, int *fds)
{
    *wire = (struct wire){request, VHOST_VERSION | VHOST_NEED_REPLY, 8, {0}};
    wire->payload.state = (struct vhost_vring_state){queue, 0};
    switch (request) {
    case VHOST_SET_FEATURES:
        wire->payload.u64 = some_features();
        break;
    case VHOST_SET_PROTOCOL_FEATURES:
        wire->payload.u64 = UINT64_MAX;
        break;
    case VHOST_SET_MEM_TABLE:
        wire->payload.memory = front_table();
        wire->size = 8 + 2 * sizeof(struct vhost_region);
        fds[0] = fds[1] = now.front->fd;
        return 2;
    case VHOST_SET_VRING_NUM:
        wire->payload.state.num = now.size;
        break;
    case VHOST_SET_VRING_BASE:
        wire->payload.state.num = front_available(now.front, queue)->index;
        break;
    case VHOST_SET_VRING_ENABLE:
        wire->payload.state.num = 1;
        break;
    case VHOST_SET_VRING_ADDR:
        wire->payload.address = front_rings(queue);
        wire->size = sizeof wire->payload.address;
        break;
    case VHOST_SET_VRING_KICK:
        fds[0] = *queue_fd(now.front->kick, queue);
        return 1;
    case VHOST_SET_VRING_CALL:
    case VHOST_SET_VRING_ERR:
        fds[0] = *queue_fd(now.front->call, queue);
        return 1;
    case VHOST_SET_BACKEND_REQ_FD:
        fds[0] = strange[below(8)];
        return 1;
    case VHOST_GET_CONFIG:
        wire->payload.config = (struct vhost_device_config){.size = 60};
        wire->size = 12 + 60;
        break;
    case VHOST_SET_CONFIG:
        wire->payload.config = (struct vhost_device_config){.offset = 32, .size = 1};
        wire->payload.config.bytes[0] = one_in(2);
        wire->size = 13;
        break;
    case VHOST_GET_INFLIGHT_FD:
    case VHOST_SET_INFLIGHT_FD:
        wire->payload.inflight = (struct vhost_inflight_area){
            .bytes = 1 << 20, .n_queues = (uint16_t)now.n_queues, .queue_size = now.size};
        wire->size = 20;
        fds[0] = strange[0];
        return request == VHOST_SET_INFLIGHT_FD;
    }
    return 0;
}

static void spoil(struct wire *wire, int *fds, unsigned *n_fds)
{
    switch (below(8)) {
    case 0:
        wire->size = (uint32_t)any_number(wire->size);
        break;
    case 1:
        wire->flags = (uint32_t)any_number(wire->flags);
        break;
    case 2:
        wire->request = (uint32_t)any_number(wire->request);
        break;
    case 3:
        *n_fds = (unsigned)below(12);
        break;
    case 4:
        fds[below(12)] = strange[below(8)];
        break;
    default:
        damage(&wire->payload, wire->size ? wire->size : 8);
    }
}

/* Send a message, wrong or not. False: the connection has ended. */
static bool say(uint32_t request, uint32_t queue, bool wrong)
{
    struct wire wire;
    int fds[12];
    for (int i = 0; i < 12; i++)
        fds[i] = one_in(2) ? now.front->fd : strange[below(8)];
    unsigned n_fds = make(&wire, request, queue, fds);
    if (wrong)
        spoil(&wire, fds, &n_fds);
    size_t length = WIRE_HEADER + (wire.size < sizeof wire.payload ? wire.size : 8);
    bool is_whole = !wrong || !one_in(64);
    count++;
    if (!drain(MSG_DONTWAIT) ||
        !front_send_bytes(now.front, &wire, is_whole ? length : below(length) + 1, fds, n_fds))
        return false;
    return wrong || drain(0); /* a right one has an answer */
}

/* Any of them, often one about a queue. */
static uint32_t any_request(void)
{
    return (uint32_t)(one_in(3) ? below(VHOST_RESET_DEVICE + 2)
                                : VHOST_SET_VRING_NUM + below(VHOST_SET_VRING_ERR - 7));
}

/* --- Rings --- */

static uint8_t *memory_at(uint64_t at) { return now.front->memory + at; }

static struct descriptor some_data(uint16_t flags)
{
    uint32_t length = (uint32_t)(one_in(64) ? below(64 << 10) : 512 * (1 + below(32)));
    uint64_t at = one_in(8) ? HALF - below(4096) : DATA + below(MEMORY - DATA - (64 << 10));
    return (struct descriptor){GUEST + at, one_in(64) ? 0 : length, flags, 0};
}

static unsigned some_ranges(struct descriptor *parts)
{
    uint64_t at = RANGES + now.n_slots % SLOTS * 512, n = 1 + below(one_in(8) ? 20 : 4);
    for (uint64_t i = 0; i < n; i++) {
        struct range range = {below(THEIRS * 8), (uint32_t)below(64), one_in(8)};
        if (one_in(16))
            damage(&range, sizeof range);
        memcpy(memory_at(at) + i * sizeof range, &range, sizeof range);
    }
    *parts = (struct descriptor){GUEST + at, (uint32_t)(n * sizeof(struct range)), 0, 0};
    return 1;
}

/* The parts of a request that is mostly right; returns how many. */
static unsigned make_request(struct descriptor *parts)
{
    static const uint32_t types[] = {IN, IN, OUT, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH, GET_ID};
    uint64_t at = HEADERS + now.n_slots++ % SLOTS * 512;
    struct header header = {types[below(9)], 0, below(THEIRS * 8)};
    unsigned n = 1;
    bool is_in = header.type == IN || header.type == GET_ID;
    parts[0] = (struct descriptor){GUEST + at, 16, 0, 0};
    if (header.type == DISCARD || header.type == WRITE_ZEROES)
        n += some_ranges(parts + 1);
    else if (header.type != FLUSH)
        for (uint64_t more = 1 + below(MAX_PARTS - 3); more; more--)
            parts[n++] = some_data(is_in ? WRITE : 0);
    parts[n++] = (struct descriptor){GUEST + at + 256, 1, WRITE, 0};
    if (one_in(24))
        damage(&header, sizeof header);
    memcpy(memory_at(at), &header, sizeof header);
    return n;
}

/* Put the parts into the queue's table, or into one of their own. */
static void place(struct descriptor *parts, unsigned n, uint32_t queue, uint16_t head)
{
    struct descriptor *table = front_descriptors(now.front, queue);
    bool is_indirect = now.has_indirect && (one_in(3) || n > now.size);
    uint64_t at = TABLES + below(one_in(16) ? HALF - TABLES : 16 << 10);
    if (one_in(8))
        at = HALF - below(64); /* in two regions */
    for (unsigned i = 0; i + 1 < n; i++) {
        parts[i].flags |= NEXT;
        parts[i].next = (uint16_t)(is_indirect ? i + 1 : (head + i + 1) % now.size);
    }
    if (one_in(128))
        damage(parts, n * sizeof *parts);
    if (is_indirect)
        memcpy(memory_at(at), parts, n * sizeof *parts);
    else
        for (unsigned i = 0; i < n; i++)
            table[(head + i) % now.size] = parts[i];
    if (is_indirect)
        table[head] = (struct descriptor){GUEST + at, n * 16, INDIRECT, 0};
    if (is_indirect && one_in(256))
        damage(&table[head], sizeof *table);
}

static void put(uint32_t queue)
{
    struct descriptor parts[MAX_PARTS];
    struct available *available = front_available(now.front, queue);
    uint16_t room = now.size / 16 ? now.size / 16 : 1,
             head = (uint16_t)(below(room) * 16 % now.size);
    place(parts, make_request(parts), queue, head);
    if (one_in(1024))
        head = (uint16_t)any_number(now.size);
    available->ring[available->index % now.size] = head;
    uint16_t more = one_in(1024) ? (uint16_t)any_number(1) : 1;
    __atomic_store_n(&available->index, (uint16_t)(available->index + more), __ATOMIC_RELEASE);
    count++;
}

/* Wait a little for answers, so that there is room again. Whether there is. */
static bool has_room(uint32_t queue)
{
    for (int i = 0; i < 1000; i++) {
        uint16_t left = (uint16_t)(front_available(now.front, queue)->index -
                                   front_used_index(now.front, queue));
        if (left < now.size / 16 + 1)
            return true;
        sched_yield();
    }
    return false;
}

static void put_some(uint32_t queue)
{
    for (uint64_t n = 1 + below(24); n && has_room(queue); n--) {
        put(queue);
        if (!one_in(8) && now.front->kick[queue] >= 0)
            front_kick(now.front, queue);
    }
    struct available *available = front_available(now.front, queue);
    if (one_in(2)) /* the event, of which interrupt to send next */
        available->ring[now.size] = front_used_index(now.front, queue);
    if (one_in(8))
        available->flags = (uint16_t)below(2);
}

/* --- Connections --- */

static bool set_up(void)
{
    static const uint32_t session[] = {VHOST_SET_OWNER,
                                       VHOST_GET_FEATURES,
                                       VHOST_SET_FEATURES,
                                       VHOST_GET_PROTOCOL_FEATURES,
                                       VHOST_SET_PROTOCOL_FEATURES,
                                       VHOST_GET_QUEUE_NUM,
                                       VHOST_GET_CONFIG,
                                       VHOST_SET_MEM_TABLE};
    static const uint32_t each[] = {
        VHOST_SET_VRING_NUM, VHOST_SET_VRING_BASE, VHOST_SET_VRING_ADDR,  VHOST_SET_VRING_CALL,
        VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_SET_VRING_ENABLE};
    bool stands = true;
    for (size_t i = 0; i < sizeof session / sizeof *session && stands; i++)
        stands = say(session[i], 0, one_in(200));
    if (stands && one_in(3))
        stands = say(one_in(4) ? VHOST_SET_INFLIGHT_FD : VHOST_GET_INFLIGHT_FD, 0, one_in(16));
    for (unsigned queue = 0; queue < now.n_queues; queue++)
        for (size_t i = 0; i < sizeof each / sizeof *each && stands; i++)
            stands = say(each[i], queue, one_in(200));
    return stands;
}

static bool step(struct victim *victim)
{
    uint32_t queue = (uint32_t)below(now.n_queues);
    switch (below(32)) {
    case 0: /* stop, and go on */
        return say(VHOST_GET_VRING_BASE, queue, false) &&
               say(VHOST_SET_VRING_KICK, queue, one_in(8));
    case 1:
        return say(VHOST_SET_CONFIG, 0, one_in(8));
    case 2:
        check_honest(victim);
        return true;
    case 3:
        if (now.inflight)
            damage(now.inflight, now.inflight_bytes < 4096 ? now.inflight_bytes : 4096);
        return true;
    case 4:
        return !one_in(32) || ftruncate(now.front->fd, (off_t)(one_in(2) ? below(MEMORY) : 0)) == 0;
    case 5:
    case 6:
        return say(any_request(), queue, one_in(2));
    default:
        put_some(queue);
        return drain(MSG_DONTWAIT);
    }
}

static void begin(const struct vhost_config *config)
{
    struct vhost_config own = *config;
    own.read_only = one_in(16);
    own.poll_us = one_in(4) ? 20 : 0;
    now.n_queues = one_in(32) ? VIRTQUEUES : 1 + (unsigned)below(3);
    now.size = (uint16_t)(1 << (one_in(4) ? below(11) : 5 + below(4)));
    now.n_slots = 0;
    now.has_indirect = false;
    now.front = front_open(&own);
    now.front->size = now.size;
    now.lost = false;
    /* Its file may be truncated under our own feet, too. */
    CHECK(tm_watch_mapping(now.front->memory, MEMORY, &now.lost) == 0);
    scribble_on(now.front->memory);
}

static void end(void)
{
    scribble_on(NULL);
    if (now.inflight)
        munmap(now.inflight, now.inflight_bytes);
    now.inflight = NULL;
    tm_forget_mapping(now.front->memory);
    n_clean += front_close(now.front, NULL) == 0;
    n_sessions++;
}

static void run_session(void)
{
    struct victim *victim = &victims[below(DEVICES)];
    begin(&victim->config);
    bool stands = set_up();
    for (uint64_t steps = below(64); steps && stands; steps--)
        stands = step(victim);
    end();
    check_honest(victim);
}

/* --- All of it --- */

static void open_victim(struct victim *victim, uint64_t room, bool durable)
{
    victim->disk = config_of(PAGES, room);
    victim->disk.durable = durable;
    victim->config = (struct vhost_config){.device = open_device(&victim->disk),
                                           .serial = "fuzz",
                                           .size = (uint64_t)THEIRS * TM_PAGE,
                                           .block_bytes = durable ? 512 : TM_PAGE};
    struct vhost_config whole = victim->config;
    whole.size = victim->disk.size;
    victim->honest = front_begin(&whole, 0, 16);
}

static void make_strange(void)
{
    int pipe_ends[2], sockets[2];
    CHECK(pipe2(pipe_ends, O_CLOEXEC) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    int all[] = {memory_file(1 << 20),
                 memory_file(0),
                 open("/dev/null", O_RDWR | O_CLOEXEC),
                 pipe_ends[0],
                 pipe_ends[1],
                 sockets[0],
                 eventfd(0, EFD_CLOEXEC),
                 sockets[1]};
    memcpy(strange, all, sizeof strange);
}

static unsigned count_descriptors(void)
{
    DIR *directory = opendir("/proc/self/fd");
    unsigned n = 0;
    CHECK(directory);
    while (readdir(directory))
        n++;
    closedir(directory);
    return n;
}

static uint64_t total(size_t counter, struct victim *from)
{
    return atomic_load((_Atomic uint64_t *)((uint8_t *)tm_doors(from->config.device) + counter));
}

void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));
static void tell_seed(void)
{
    fprintf(stderr, "fuzz: in the connection made from %llu\n", (unsigned long long)session_seed);
}

static void aborted(int signal)
{
    (void)signal;
    tell_seed();
    _exit(1);
}

int main(int argc, char **argv)
{
    CHECK(argc >= 4);
    uint64_t wanted = strtoull(argv[1], NULL, 10), seed = strtoull(argv[2], NULL, 10), requests = 0,
             failures = 0;
    pthread_t scribbler;
    bool scribbles = strcmp(argv[3], "scribble") == 0;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGABRT, aborted);
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(tell_seed);
    make_strange();
    for (int i = 0; i < DEVICES; i++)
        open_victim(&victims[i], i ? 8 << 20 : 256 << 10, i == 2);
    CHECK(!scribbles || pthread_create(&scribbler, NULL, scribble, &seed) == 0);
    unsigned descriptors = count_descriptors();
    for (session_seed = seed | 1; count < wanted; session_seed += 2) {
        state = session_seed * UINT64_C(0x9e3779b97f4a7c15);
        run_session();
    }
    CHECK(count_descriptors() == descriptors);
    atomic_store(&finished, true);
    CHECK(!scribbles || pthread_join(scribbler, NULL) == 0);
    for (int i = 0; i < DEVICES; i++) {
        requests += total(offsetof(struct tm_doors, requests), &victims[i]);
        failures += total(offsetof(struct tm_doors, failures), &victims[i]);
        CHECK(total(offsetof(struct tm_doors, vhost), &victims[i]) == 1);
        CHECK(front_close(victims[i].honest, NULL) == 0);
        tm_close(victims[i].config.device);
    }
    if (argc > 4)
        printf("%llu messages and requests in %llu connections, of which %llu ended well; %llu "
               "requests were carried out, of which %llu failed\n",
               (unsigned long long)count, (unsigned long long)n_sessions,
               (unsigned long long)n_clean, (unsigned long long)requests,
               (unsigned long long)failures);
    CHECK(wanted < 10000 || (requests > wanted / 4 && failures < requests / 2));
    puts("ok");
    return 0;
}
