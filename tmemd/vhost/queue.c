/* SPDX-License-Identifier: BSD-3-Clause */
#define _GNU_SOURCE
#include "queue.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "block.h"
#include "statistics.h"
#include "thread.h"

/* At most so many requests for one interrupt. */
enum { PASS = 32 };

/* The time of one request in so many is noted: looking at the clock twice costs 100 ns. */
enum { SAMPLE = 16 };

/* Watching the ring pays where the guest's next request comes before a sleep and a wake-up would be
 * over. Each time that something came is a point, each time in vain takes two; without points a
 * queue is only slept on. Then, every so many sleeps that were shorter than the watching would have
 * been, it gets a chance, and each that it misses makes the next one rarer. */
enum { POINTS_MAX = 16, CHANCE_MIN = 8, CHANCE_MAX = 4096 };

void queue_init(struct queue *queue)
{
    *queue = (struct queue){.kick = -1, .call = -1, .failure = -1, .epoll = -1, .stop = -1};
    pthread_mutex_init(&queue->lead, NULL);
    pthread_mutex_init(&queue->answers, NULL);
    pthread_cond_init(&queue->changed, NULL);
}

bool queue_is_running(const struct queue *queue) { return queue->epoll >= 0; }

static struct tm_doors *door(const struct queue *queue) { return tm_doors(queue->config->device); }

static void write_event(int fd)
{
    ssize_t ignored = fd >= 0 ? write(fd, &(uint64_t){1}, sizeof(uint64_t)) : 0;
    (void)ignored; /* a full pipe or counter wakes as well */
}

void queue_interrupt(struct queue *queue)
{
    pthread_mutex_lock(&queue->answers);
    write_event(queue->call);
    pthread_mutex_unlock(&queue->answers);
}

void queue_set_fd(struct queue *queue, int *place, int fd)
{
    if (fd >= 0) /* a guest that takes in no interrupts must not stop us; O_NONBLOCK is shared */
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    pthread_mutex_lock(&queue->answers);
    int old = *place;
    *place = fd;
    pthread_mutex_unlock(&queue->answers);
    if (old >= 0)
        close(old);
}

/* A guest may use a head again as soon as its answer is in the ring. That answer's mark in the
 * inflight area is cleared before the head is taken, and marked, anew. */
static int take(struct queue *queue, struct chain *chain)
{
    if (queue->ring.inflight)
        pthread_mutex_lock(&queue->answers);
    int taken = virtqueue_take(&queue->ring, chain);
    if (queue->ring.inflight)
        pthread_mutex_unlock(&queue->answers);
    return taken;
}

/* Answer, and interrupt the guest if it wants that. */
static void answer(struct queue *queue, uint16_t head, uint32_t written)
{
    pthread_mutex_lock(&queue->answers);
    virtqueue_answer(&queue->ring, head, written);
    pthread_mutex_unlock(&queue->answers);
}

static void interrupt_if_wanted(struct queue *queue)
{
    pthread_mutex_lock(&queue->answers);
    if (virtqueue_wants_interrupt(&queue->ring)) {
        write_event(queue->call);
        stats_add(&door(queue)->interrupts, 1);
    }
    pthread_mutex_unlock(&queue->answers);
}

/* The guest or its front end broke a rule: the connection ends, and with it the queue. */
static void give_up(struct queue *queue)
{
    atomic_store(&queue->broken, true);
    atomic_store(&queue->stopping, true);
    pthread_mutex_lock(&queue->answers);
    write_event(queue->failure);
    pthread_mutex_unlock(&queue->answers);
    shutdown(queue->socket, SHUT_RDWR);
}

static void carry_out(struct queue *queue, struct chain *chain, struct block_request *request,
                      uint8_t *buffer)
{
    struct tm_doors *counters = door(queue);
    bool is_sampled =
        atomic_fetch_add_explicit(&counters->requests, 1, memory_order_relaxed) % SAMPLE == 0;
    uint64_t start = is_sampled ? stats_now() : 0;
    block_execute(queue->config, request, buffer, !atomic_load(queue->write_back));
    answer(queue, chain->head, request->written);
    if (request->failed)
        stats_add(&counters->failures, 1);
    if (is_sampled)
        stats_took(&counters->request, start);
}

static void *work(void *argument);

/* Let another thread lead, as long as there may be more. */
static void hand_over(struct queue *queue)
{
    pthread_mutex_lock(&queue->lead);
    queue->has_leader = false;
    if (queue->n_idle)
        pthread_cond_signal(&queue->changed);
    else if (queue->n_threads < QUEUE_THREADS && !atomic_load(&queue->stopping))
        queue->n_threads += thread_start(&queue->threads[queue->n_threads], work, queue);
    pthread_mutex_unlock(&queue->lead);
}

enum turn { DONE, HANDED_OVER, ENDED };

/* Take what is in the ring, and carry it out. */
static enum turn pass(struct queue *queue, struct chain *chain, uint8_t *buffer)
{
    struct block_request request;
    enum turn turn = DONE;
    for (int i = 0; i < PASS && turn == DONE && !atomic_load(&queue->stopping); i++) {
        int taken = take(queue, chain);
        if (!taken)
            break;
        if (taken < 0 || !block_parse(queue->config, chain, &request)) {
            give_up(queue);
            return ENDED;
        }
        if (block_may_wait(queue->config, &request)) {
            interrupt_if_wanted(queue);
            hand_over(queue);
            turn = HANDED_OVER;
        }
        carry_out(queue, chain, &request, buffer);
    }
    interrupt_if_wanted(queue);
    if (atomic_load(&queue->ring.memory->lost))
        give_up(queue);
    return turn;
}

/* Watch the ring for a while. True: something came. */
static bool watch(struct queue *queue)
{
    uint64_t end = stats_now() + queue->config->poll_us * UINT64_C(1000);
    bool won = false;
    do
        for (int i = 0; i < 64 && !won; i++) {
            __builtin_ia32_pause();
            won = virtqueue_has_more(&queue->ring);
        }
    while (!won && !atomic_load(&queue->stopping) && stats_now() < end);
    stats_add(&door(queue)->polls, 1);
    stats_add(&door(queue)->polls_won, won);
    if (won) {
        queue->points += queue->points < POINTS_MAX;
        queue->chance = CHANCE_MIN;
    } else {
        queue->points = queue->points > 2 ? queue->points - 2 : 0;
    }
    return won;
}

/* After a sleep: whether watching might have been better. */
static void learn(struct queue *queue, uint64_t slept_ns)
{
    if (slept_ns > queue->config->poll_us * UINT64_C(1000) || ++queue->short_sleeps < queue->chance)
        return;
    queue->short_sleeps = 0;
    queue->points = 1;
    queue->chance = queue->chance < CHANCE_MAX ? 2 * queue->chance : CHANCE_MAX;
}

/* Return when there may be more to do. The eventfds are never read: each write is an edge. */
static void wait_for_more(struct queue *queue)
{
    struct epoll_event events[2];
    if (queue->points && watch(queue))
        return;
    if (!virtqueue_enable_kicks(&queue->ring)) {
        bool learns = queue->config->poll_us && !queue->points;
        uint64_t start = learns ? stats_now() : 0;
        if (epoll_wait(queue->epoll, events, 2, -1) > 0)
            stats_add(&door(queue)->kicks, 1);
        if (learns)
            learn(queue, stats_now() - start);
    }
    virtqueue_disable_kicks(&queue->ring);
}

static void lead(struct queue *queue, struct chain *chain, uint8_t *buffer)
{
    enum turn turn = DONE;
    while (turn == DONE && !atomic_load(&queue->stopping)) {
        turn = pass(queue, chain, buffer);
        if (turn == DONE && !virtqueue_has_more(&queue->ring))
            wait_for_more(queue);
    }
    if (turn != HANDED_OVER)
        hand_over(queue);
}

static void *work(void *argument)
{
    struct queue *queue = argument;
    struct chain chain;
    uint8_t *buffer = malloc(BLOCK_BUFFER);
    if (!buffer)
        give_up(queue);
    pthread_mutex_lock(&queue->lead);
    while (!atomic_load(&queue->stopping)) {
        queue->n_idle++;
        while (queue->has_leader && !atomic_load(&queue->stopping))
            pthread_cond_wait(&queue->changed, &queue->lead);
        queue->n_idle--;
        queue->has_leader = true;
        pthread_mutex_unlock(&queue->lead);
        lead(queue, &chain, buffer);
        pthread_mutex_lock(&queue->lead);
    }
    pthread_cond_broadcast(&queue->changed);
    pthread_mutex_unlock(&queue->lead);
    free(buffer);
    return NULL;
}

static int watch_fd(const struct queue *queue, int fd, uint32_t events)
{
    struct epoll_event event = {.events = events};
    return epoll_ctl(queue->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? errno : 0;
}

static int open_waiting(struct queue *queue)
{
    queue->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    queue->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (queue->stop < 0 || queue->epoll < 0)
        return errno;
    int error = watch_fd(queue, queue->stop, EPOLLIN);
    return error ? error : watch_fd(queue, queue->kick, EPOLLIN | EPOLLET);
}

static void close_waiting(struct queue *queue)
{
    if (queue->epoll >= 0)
        close(queue->epoll);
    if (queue->stop >= 0)
        close(queue->stop);
    queue->epoll = queue->stop = -1;
}

int queue_start(struct queue *queue, const struct vhost_config *config,
                const _Atomic bool *write_back, int socket)
{
    queue->config = config;
    queue->write_back = write_back;
    queue->socket = socket;
    queue->stopping = queue->broken = queue->has_leader = false;
    queue->n_threads = queue->n_idle = 0;
    queue->points = config->poll_us ? 1 : 0;
    queue->chance = CHANCE_MIN;
    queue->short_sleeps = 0;
    int error = virtqueue_start(&queue->ring);
    if (!error)
        error = open_waiting(queue);
    pthread_mutex_lock(&queue->lead);
    if (!error && !(queue->n_threads = thread_start(&queue->threads[0], work, queue)))
        error = EAGAIN;
    pthread_mutex_unlock(&queue->lead);
    if (error) {
        close_waiting(queue);
        virtqueue_stop(&queue->ring);
        return error;
    }
    queue_interrupt(queue); /* the last process may have been killed before its last one */
    return 0;
}

static void end_threads(struct queue *queue)
{
    pthread_mutex_lock(&queue->lead);
    atomic_store(&queue->stopping, true);
    pthread_cond_broadcast(&queue->changed);
    unsigned n = queue->n_threads;
    pthread_mutex_unlock(&queue->lead);
    write_event(queue->stop);
    for (unsigned i = 0; i < n; i++)
        pthread_join(queue->threads[i], NULL);
    queue->n_threads = 0;
}

void queue_finish(struct queue *queue)
{
    struct block_request request;
    struct chain chain;
    if (!queue_is_running(queue))
        return;
    end_threads(queue);
    uint8_t *buffer = malloc(BLOCK_BUFFER);
    while (buffer && queue->ring.n_resubmit && !atomic_load(&queue->broken)) {
        if (take(queue, &chain) > 0 && block_parse(queue->config, &chain, &request))
            carry_out(queue, &chain, &request, buffer);
        else
            give_up(queue);
    }
    free(buffer);
    interrupt_if_wanted(queue);
    queue_stop(queue);
}

void queue_stop(struct queue *queue)
{
    if (!queue_is_running(queue))
        return;
    end_threads(queue);
    close_waiting(queue);
    virtqueue_stop(&queue->ring);
}

void queue_destroy(struct queue *queue)
{
    queue_set_fd(queue, &queue->kick, -1);
    queue_set_fd(queue, &queue->call, -1);
    queue_set_fd(queue, &queue->failure, -1);
    pthread_mutex_destroy(&queue->lead);
    pthread_mutex_destroy(&queue->answers);
    pthread_cond_destroy(&queue->changed);
}
