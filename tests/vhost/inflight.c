/* SPDX-License-Identifier: BSD-3-Clause */
/* A back end is killed before each single store into what it shares with the guest, and the next
 * one as well: who comes then does what was left, each request once and in their order. Exit status
 * 0 and 'ok'. */
#define _GNU_SOURCE
#include "front.h"

static void before_store(void);
#define __atomic_store_n(at, value, order) (before_store(), __atomic_store_n(at, value, order))
#include "virtqueue.c"
#undef __atomic_store_n

enum { SIZE = 8, REQUESTS = 60, FIRST = 65500, LIVES = 3 };

/* What outlives a back end: the guest's memory and the inflight area. */
struct shared {
    struct vring_descriptor descriptors[SIZE];
    uint16_t available_flags, available_index, available[SIZE], used_event;
    _Alignas(4) uint16_t used_flags;
    uint16_t used_index;
    struct vring_used_element used[SIZE];
    uint16_t available_event;
    _Alignas(64) uint64_t inflight[64];
};

/* What the guest knows. */
struct guest {
    uint16_t offered[REQUESTS]; /* heads, in their order */
    unsigned n_offered, n_seen; /* requests, and answers that it has looked at */
    bool is_busy[SIZE];         /* this head is not answered */
};

/* One process that serves the ring. */
struct life {
    struct shared *shared;
    struct guest *guest;
    struct memory memory;
    struct virtqueue ring;
    uint16_t taken[SIZE];
    unsigned n_taken; /* and not answered */
    uint64_t chance;
};

static struct life *living[LIVES];
static unsigned n_living, n_deaths;

static uint64_t below(struct life *life, uint64_t n)
{
    life->chance = life->chance * UINT64_C(6364136223846793005) + 1442695040888963407;
    return (life->chance >> 33) % n;
}

static void offer(struct shared *shared, struct guest *guest, uint16_t head)
{
    shared->descriptors[head] = (struct vring_descriptor){GUEST, 1, DESCRIPTOR_WRITE, 0};
    guest->is_busy[head] = true;
    guest->offered[guest->n_offered++] = head;
    shared->available[shared->available_index++ % SIZE] = head;
}

/* Look at the answers: they are to what was asked and not answered. */
static void look(const struct shared *shared, struct guest *guest)
{
    while ((uint16_t)(FIRST + guest->n_seen) != shared->used_index) {
        uint32_t head = shared->used[(FIRST + guest->n_seen++) % SIZE].head;
        CHECK(head < SIZE && guest->is_busy[head]);
        guest->is_busy[head] = false;
    }
}

static void start(struct life *life, struct shared *shared, struct guest *guest, uint64_t seed)
{
    *life = (struct life){.shared = shared, .guest = guest, .chance = seed};
    life->memory = (struct memory){
        .n = 1,
        .regions[0] = {.where = {GUEST, sizeof *shared, USER, 0}, .base = (uint8_t *)shared}};
    life->ring = (struct virtqueue){.memory = &life->memory,
                                    .descriptors = shared->descriptors,
                                    .available = (void *)&shared->available_flags,
                                    .used = (void *)&shared->used_flags,
                                    .inflight = (void *)shared->inflight,
                                    .size = SIZE,
                                    .next = FIRST};
    living[n_living++] = life;
    CHECK(virtqueue_start(&life->ring) == 0);
}

static bool take(struct life *life)
{
    struct chain chain;
    int taken = virtqueue_take(&life->ring, &chain);
    CHECK(taken >= 0);
    if (taken)
        life->taken[life->n_taken++] = chain.head;
    return taken;
}

static void answer(struct life *life)
{
    if (!life->n_taken)
        return;
    unsigned i = (unsigned)below(life, life->n_taken);
    uint16_t head = life->taken[i];
    life->taken[i] = life->taken[--life->n_taken];
    virtqueue_answer(&life->ring, head, 1);
}

static void stop(struct life *life)
{
    virtqueue_stop(&life->ring);
    n_living--;
}

/* Whoever comes finds all that was not answered, the eldest first, and answers it. */
static void finish(const struct shared *left, const struct guest *known)
{
    struct shared shared = *left;
    struct guest guest = *known;
    struct life life;
    look(&shared, &guest);
    start(&life, &shared, &guest, n_deaths);
    unsigned next = 0;
    for (unsigned i = 0; i < guest.n_offered; i++) {
        uint16_t head = guest.offered[i];
        bool is_last = true;
        for (unsigned j = i + 1; j < guest.n_offered; j++)
            is_last &= guest.offered[j] != head;
        if (is_last && guest.is_busy[head])
            CHECK(take(&life) && life.taken[next++] == head);
    }
    CHECK(!take(&life));
    while (life.n_taken)
        answer(&life);
    stop(&life);
    look(&shared, &guest);
    for (uint16_t head = 0; head < SIZE; head++)
        CHECK(!guest.is_busy[head]);
    CHECK(guest.n_seen == guest.n_offered);
}

/* Of the last one that lives: it is killed here, which the one before does not know. */
static void before_store(void)
{
    if (n_living == LIVES)
        return;
    struct life *life = living[n_living - 1];
    n_deaths++;
    finish(life->shared, life->guest);
}

static void live(uint64_t seed)
{
    struct shared shared = {.available_index = FIRST, .used_index = FIRST};
    struct guest guest = {0};
    struct life life;
    start(&life, &shared, &guest, seed);
    while (guest.n_seen < REQUESTS) {
        uint16_t head = (uint16_t)below(&life, SIZE);
        look(&shared, &guest);
        if (!guest.is_busy[head] && guest.n_offered < REQUESTS)
            offer(&shared, &guest, head);
        else if (below(&life, 2) || !take(&life))
            answer(&life);
    }
    stop(&life);
}

int main(void)
{
    CHECK(sizeof(uint64_t[64]) >= virtqueue_inflight_bytes(SIZE));
    for (uint64_t seed = 1; seed <= 8; seed++)
        live(seed);
    CHECK(n_deaths > 10000);
    puts("ok");
    return 0;
}
