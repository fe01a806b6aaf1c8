/* SPDX-License-Identifier: BSD-3-Clause */
/* Requests that wait for a slow disk: what passes them, and what happens to a queue and its
 * connection meanwhile. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/syscall.h>

#include "front.h"
#include "queue.h"

static void before_store(const void *at, uint64_t value);
#define __atomic_store_n(at, value, order)                                                         \
    (before_store(at, value), __atomic_store_n(at, value, order))
#include "virtqueue.c"
#undef __atomic_store_n

enum { PAGES = 512, SIZE = 128, IN_RAM = 0, IN_FILE = 256, OK = 0 };

static struct tm_config disk;
static struct vhost_config config;

/* The disk answers no reads while it is held; how many wait. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool is_held;
static unsigned waiting;

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    pthread_mutex_lock(&lock);
    waiting += fd == disk.file_fd;
    pthread_cond_broadcast(&changed);
    while (is_held && fd == disk.file_fd)
        pthread_cond_wait(&changed, &lock);
    waiting -= fd == disk.file_fd;
    pthread_mutex_unlock(&lock);
    return syscall(SYS_pread64, fd, buffer, length, offset);
}

static void hold(bool held)
{
    pthread_mutex_lock(&lock);
    is_held = held;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void await_readers(unsigned n)
{
    pthread_mutex_lock(&lock);
    while (waiting != n)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static bool has_readers(void)
{
    pthread_mutex_lock(&lock);
    bool has = waiting;
    pthread_mutex_unlock(&lock);
    return has;
}

/* How often somebody has begun to wait for a thread's end, as those who stop a queue do. */
static unsigned joins;

int __real_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_join(pthread_t thread, void **result);
int __wrap_pthread_join(pthread_t thread, void **result)
{
    pthread_mutex_lock(&lock);
    joins++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return __real_pthread_join(thread, result);
}

/* Send what stops a queue; return when it is being stopped. */
static void send_stop(struct front *front, const struct wire *wire, const int *fds, unsigned n_fds)
{
    pthread_mutex_lock(&lock);
    unsigned before = joins;
    pthread_mutex_unlock(&lock);
    CHECK(front_send(front, wire, fds, n_fds));
    pthread_mutex_lock(&lock);
    while (joins == before)
        pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static struct front *begin(void) { return front_begin(&config, 0, SIZE); }

/* Offer a read of a page. */
static void ask(struct front *front, uint16_t head, uint64_t page)
{
    front_describe(front, 0, head, IN, page * 8, TM_PAGE);
    front_offer(front, 0, head);
}

/* Whether it was answered, and with the page's content. */
static bool has(struct front *front, uint16_t head, uint64_t page)
{
    uint8_t *place = front_place(front, head);
    return place[STATUS_AT] == OK && place[DATA_AT] == (uint8_t)page &&
           place[DATA_AT + TM_PAGE - 1] == (uint8_t)page;
}

static void end(struct front *front) { CHECK(front_close(front, NULL) == 0); }

static void test_a_page_in_ram_passes_those_that_wait(void)
{
    struct front *front = begin();
    hold(true);
    for (uint16_t n = 1; n < QUEUE_THREADS; n++) { /* as long as there is a thread left */
        uint16_t slow = (uint16_t)(3 * n);
        ask(front, slow, IN_FILE + n);
        await_readers(n);
        ask(front, 0, IN_RAM + n);
        CHECK(front_wait(front, 0, 1) && has(front, 0, IN_RAM + n));
        CHECK(front_place(front, slow)[STATUS_AT] == NO_ANSWER);
    }
    hold(false);
    CHECK(front_wait(front, 0, QUEUE_THREADS - 1));
    for (uint16_t n = 1; n < QUEUE_THREADS; n++)
        CHECK(has(front, (uint16_t)(3 * n), IN_FILE + n));
    end(front);
}

static void test_when_all_threads_wait_the_next_one_goes_on(void)
{
    struct front *front = begin();
    hold(true);
    for (uint16_t n = 0; n < QUEUE_THREADS; n++)
        ask(front, (uint16_t)(3 * n), IN_FILE + QUEUE_THREADS + n);
    await_readers(QUEUE_THREADS);
    ask(front, 3 * QUEUE_THREADS, IN_RAM + 1);
    hold(false);
    CHECK(front_wait(front, 0, QUEUE_THREADS + 1) && has(front, 3 * QUEUE_THREADS, IN_RAM + 1));
    end(front);
}

/* A message that stops the queue while a request is under way. Its reply comes when that is
 * answered, not before. */
static void check_stop(const struct wire *wire, const int *fds, unsigned n_fds, uint64_t page)
{
    struct front *front = begin();
    struct wire reply;
    int fd;
    hold(true);
    ask(front, 0, page);
    await_readers(1);
    send_stop(front, wire, fds, n_fds);
    struct pollfd answer = {.fd = front->socket, .events = POLLIN};
    CHECK(poll(&answer, 1, 0) == 0 && front_used_index(front, 0) == 0);
    hold(false);
    CHECK(front_receive(front, &reply, &fd) && reply.request == wire->request);
    CHECK(front_used_index(front, 0) == 1 && has(front, 0, page));
    CHECK(wire->request != VHOST_GET_VRING_BASE || reply.payload.state.num == 1);
    end(front);
}

static void test_who_stops_a_queue_waits_for_what_was_taken(void)
{
    struct wire wire = {VHOST_GET_VRING_BASE, VHOST_VERSION, 8, {0}};
    check_stop(&wire, NULL, 0, IN_FILE + 2 * QUEUE_THREADS + 0);
    wire.flags |= VHOST_NEED_REPLY;
    wire.request = VHOST_RESET_DEVICE;
    check_stop(&wire, NULL, 0, IN_FILE + 2 * QUEUE_THREADS + 1);
    wire.request = VHOST_SET_VRING_ENABLE;
    check_stop(&wire, NULL, 0, IN_FILE + 2 * QUEUE_THREADS + 2);
    wire.request = VHOST_SET_VRING_NUM;
    wire.payload.state.num = SIZE;
    check_stop(&wire, NULL, 0, IN_FILE + 2 * QUEUE_THREADS + 3);
    wire.request = VHOST_SET_MEM_TABLE;
    wire.payload.u64 = 0;
    check_stop(&wire, NULL, 0, IN_FILE + 2 * QUEUE_THREADS + 4);
    int kick = eventfd(0, EFD_CLOEXEC);
    wire.request = VHOST_SET_VRING_KICK;
    check_stop(&wire, &kick, 1, IN_FILE + 2 * QUEUE_THREADS + 5);
    close(kick);
}

/* Let an area say that the first n heads, three apart, are in flight. */
static void mark(struct inflight_queue *area, uint16_t n)
{
    area->version = INFLIGHT_VERSION;
    for (uint16_t i = 0; i < n; i++)
        area->descriptors[3 * i] = (struct inflight_descriptor){.inflight = 1, .counter = i};
}

static void test_who_stops_a_queue_waits_for_what_the_last_process_left(void)
{
    enum { LEFT = QUEUE_THREADS + 2 };
    struct front *front = begin();
    struct wire wire = {.payload.inflight = {.n_queues = 1, .queue_size = SIZE}};
    int fd = front_get(front, VHOST_GET_INFLIGHT_FD, &wire, 20);
    uint64_t bytes = wire.payload.inflight.bytes;
    struct inflight_queue *area = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(area != MAP_FAILED && front_set_state(front, VHOST_SET_VRING_ENABLE, 0, 0) == 0);
    for (uint16_t i = 0; i < LEFT; i++)
        ask(front, (uint16_t)(3 * i), IN_FILE + 3 * QUEUE_THREADS + i);
    mark(area, LEFT);
    hold(true);
    CHECK(front_set_state(front, VHOST_SET_VRING_ENABLE, 0, 1) == 0);
    await_readers(QUEUE_THREADS);
    struct wire stop = {VHOST_GET_VRING_BASE, VHOST_VERSION, 8, {0}};
    send_stop(front, &stop, NULL, 0);
    hold(false);
    CHECK(front_receive(front, &stop, &(int){0}) && stop.payload.state.num == LEFT);
    CHECK(front_used_index(front, 0) == LEFT);
    for (uint16_t i = 0; i < LEFT; i++)
        CHECK(has(front, (uint16_t)(3 * i), IN_FILE + 3 * QUEUE_THREADS + i) &&
              !area->descriptors[3 * i].inflight);
    end(front);
    munmap(area, bytes);
    close(fd);
}

static void test_an_inflight_area_may_come_late(void)
{
    struct front *front = begin();
    struct wire wire = {.payload.inflight = {.n_queues = 1, .queue_size = SIZE}};
    ask(front, 0, IN_RAM);
    CHECK(front_wait(front, 0, 1));
    close(front_get(front, VHOST_GET_INFLIGHT_FD, &wire, 20));
    ask(front, 0, IN_RAM + 1);
    CHECK(front_wait(front, 0, 1) && has(front, 0, IN_RAM + 1));
    end(front);
}

static void *let_go(void *front)
{
    struct pollfd hung = {.fd = ((struct front *)front)->served, .events = POLLRDHUP};
    CHECK(poll(&hung, 1, -1) == 1);
    hold(false);
    return NULL;
}

static void test_who_hangs_up_leaves_nothing_half_done(void)
{
    struct front *front = begin();
    pthread_t thread;
    int fd = dup(front->fd);
    hold(true);
    ask(front, 0, IN_FILE + 200);
    await_readers(1);
    CHECK(pthread_create(&thread, NULL, let_go, front) == 0);
    end(front);
    CHECK(pthread_join(thread, NULL) == 0);
    uint8_t status;
    CHECK(syscall(SYS_pread64, fd, &status, 1, PLACES + STATUS_AT) == 1 && status == OK);
    close(fd);
}

static void test_a_queue_that_is_damaged_answers_what_was_taken(void)
{
    struct front *front = begin();
    int fd = dup(front->fd);
    struct pollfd hung = {.fd = front->socket, .events = POLLRDHUP};
    uint8_t status;
    hold(true);
    ask(front, 0, IN_FILE + 201);
    await_readers(1);
    front_offer(front, 0, SIZE);
    CHECK(poll(&hung, 1, -1) == 1);
    hold(false);
    CHECK(front_close(front, NULL) == EPROTO);
    CHECK(syscall(SYS_pread64, fd, &status, 1, PLACES + STATUS_AT) == 1 && status == OK);
    close(fd);
}

/* The first descriptor's mark in an inflight area, and who asks again, by the same head, for
 * another page before it is cleared: the answer is in the ring already. */
enum { MARK = sizeof(struct inflight_queue) };
static struct front *_Atomic eager;

static void before_store(const void *at, uint64_t value)
{
    struct front *front = atomic_load(&eager);
    if (!front || value || (uintptr_t)at % TM_PAGE != MARK || !front_used_index(front, 0))
        return;
    atomic_store(&eager, NULL);
    hold(true);
    ask(front, 0, IN_FILE + 203);
    /* Whoever takes that has time to, unless he has to wait for us. */
    for (int i = 0; i < 10000 && !has_readers(); i++)
        sched_yield();
}

static void test_a_head_that_is_used_again_at_once_is_marked(void)
{
    struct front *front = begin();
    struct wire wire = {.payload.inflight = {.n_queues = 1, .queue_size = SIZE}};
    int fd = front_get(front, VHOST_GET_INFLIGHT_FD, &wire, 20);
    uint64_t bytes = wire.payload.inflight.bytes;
    uint8_t *area = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(area != MAP_FAILED);
    CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, 0, front->kick[0]) == 0);
    hold(true);
    ask(front, 0, IN_FILE + 202);
    await_readers(1);
    atomic_store(&eager, front);
    hold(false);
    while (front_used_index(front, 0) == 0 || atomic_load(&eager))
        sched_yield();
    await_readers(1);
    /* The first answer is whole once another has come from behind it. */
    ask(front, 3, IN_RAM);
    CHECK(front_wait(front, 0, 2));
    CHECK(__atomic_load_n(&area[MARK], __ATOMIC_ACQUIRE) == 1);
    hold(false);
    CHECK(front_wait(front, 0, 1) && has(front, 0, IN_FILE + 203));
    end(front);
    CHECK(area[MARK] == 0 && area[MARK + 3 * sizeof(struct inflight_descriptor)] == 0);
    munmap(area, bytes);
    close(fd);
}

int main(void)
{
    uint8_t content[TM_PAGE];
    signal(SIGPIPE, SIG_IGN);
    disk = config_of(PAGES, 4 << 20);
    config = (struct vhost_config){.device = open_device(&disk),
                                   .serial = "waiting",
                                   .size = disk.size,
                                   .block_bytes = TM_PAGE};
    for (uint64_t page = 0; page < PAGES; page++) {
        memset(content, (int)page, sizeof content);
        freeze(config.device, page >= IN_FILE);
        CHECK(tm_write(config.device, content, sizeof content, page * TM_PAGE, false) == 0);
    }
    freeze(config.device, 0);
    test_a_page_in_ram_passes_those_that_wait();
    test_when_all_threads_wait_the_next_one_goes_on();
    test_who_stops_a_queue_waits_for_what_was_taken();
    test_who_stops_a_queue_waits_for_what_the_last_process_left();
    test_an_inflight_area_may_come_late();
    test_who_hangs_up_leaves_nothing_half_done();
    test_a_queue_that_is_damaged_answers_what_was_taken();
    test_a_head_that_is_used_again_at_once_is_marked();
    tm_close(config.device);
    puts("ok");
    return 0;
}
