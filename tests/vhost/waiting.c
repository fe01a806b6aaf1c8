/* Requests that wait for a slow disk: what passes them, and what happens to a queue and its
 * connection meanwhile. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/syscall.h>

#include "front.h"
#include "queue.h"

enum { PAGES = 512, SIZE = 32, IN_RAM = 0, IN_FILE = 256, OK = 0 };

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
        ask(front, (uint16_t)(3 * n), IN_FILE + 16 + n);
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
    CHECK(front_send(front, wire, fds, n_fds));
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
    check_stop(&wire, NULL, 0, IN_FILE + 32);
    wire.flags |= VHOST_NEED_REPLY;
    wire.request = VHOST_RESET_DEVICE;
    check_stop(&wire, NULL, 0, IN_FILE + 33);
    wire.request = VHOST_SET_VRING_ENABLE;
    check_stop(&wire, NULL, 0, IN_FILE + 34);
    wire.request = VHOST_SET_VRING_NUM;
    wire.payload.state.num = SIZE;
    check_stop(&wire, NULL, 0, IN_FILE + 35);
    wire.request = VHOST_SET_MEM_TABLE;
    wire.payload.u64 = 0;
    check_stop(&wire, NULL, 0, IN_FILE + 36);
    int kick = eventfd(0, EFD_CLOEXEC);
    wire.request = VHOST_SET_VRING_KICK;
    check_stop(&wire, &kick, 1, IN_FILE + 37);
    close(kick);
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
    ask(front, 0, IN_FILE + 48);
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
    ask(front, 0, IN_FILE + 49);
    await_readers(1);
    front_offer(front, 0, SIZE);
    CHECK(poll(&hung, 1, -1) == 1);
    hold(false);
    CHECK(front_close(front, NULL) == EPROTO);
    CHECK(syscall(SYS_pread64, fd, &status, 1, PLACES + STATUS_AT) == 1 && status == OK);
    close(fd);
}

/* The request's head may be had again as soon as it is answered: its mark must outlive that. */
static void test_what_is_in_flight_is_marked(void)
{
    struct front *front = begin();
    struct wire wire = {.payload.inflight = {.n_queues = 1, .queue_size = SIZE}};
    int fd = front_get(front, VHOST_GET_INFLIGHT_FD, &wire, 20);
    uint64_t bytes = wire.payload.inflight.bytes;
    uint8_t *area = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(area != MAP_FAILED);
    CHECK(front_set_fd(front, VHOST_SET_VRING_KICK, 0, front->kick[0]) == 0);
    for (int turn = 0; turn < 3; turn++) {
        hold(true);
        ask(front, 0, IN_FILE + 64 + (uint64_t)turn);
        await_readers(1);
        CHECK(area[16] == 1 && area[16 + 16] == 0);
        ask(front, 3, IN_RAM);
        CHECK(front_wait(front, 0, 1));
        hold(false);
        CHECK(front_wait(front, 0, 1));
    }
    end(front);
    CHECK(area[16] == 0 && area[16 + 3 * 16] == 0);
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
    test_who_hangs_up_leaves_nothing_half_done();
    test_a_queue_that_is_damaged_answers_what_was_taken();
    test_what_is_in_flight_is_marked();
    tm_close(config.device);
    puts("ok");
    return 0;
}
