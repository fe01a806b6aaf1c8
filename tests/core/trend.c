/* SPDX-License-Identifier: BSD-3-Clause */
/* Trends are found where, and only where, more than half of a window agree, as a count of all says;
 * and what is fetched along them is what is read next. Exit status 0 and 'ok'. */
#define _GNU_SOURCE
#include "trend.h"

#include "fixture.h"

enum { PAGES = 1 << 19, HISTORIES = 200000 };

static uint64_t state = 88172645463325252;

static uint64_t below(uint64_t n)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % n;
}

/* By counting each of them. */
static bool slow_majority(const int64_t *deltas, uint64_t n, int64_t *delta)
{
    for (uint64_t window = TREND_SHORTEST; window <= TREND_HISTORY && window <= n; window *= 2)
        for (uint64_t i = n - window; i < n; i++) {
            uint64_t count = 0;
            for (uint64_t j = n - window; j < n; j++)
                count += deltas[j % TREND_HISTORY] == deltas[i % TREND_HISTORY];
            *delta = deltas[i % TREND_HISTORY];
            if (2 * count > window)
                return true;
        }
    return false;
}

static void test_majorities_are_those_that_a_count_finds(void)
{
    unsigned found = 0;
    for (unsigned i = 0; i < HISTORIES; i++) {
        int64_t deltas[TREND_HISTORY], one, other;
        uint64_t n = below(3 * TREND_HISTORY), values = 1 + below(4), usual = below(100);
        for (unsigned j = 0; j < TREND_HISTORY; j++)
            deltas[j] = below(100) < usual ? -1 : (int64_t)below(values);
        bool is_found = trend_majority(deltas, n, &one);
        CHECK(is_found == slow_majority(deltas, n, &other) && (!is_found || one == other));
        found += is_found;
    }
    CHECK(found > HISTORIES / 10 && found < HISTORIES * 9 / 10);
}

static struct trend trend;
static bool fetched[PAGES]; /* ahead, and not read since */
static unsigned n_fetched, n_hits;

static void begin(void)
{
    trend = (struct trend){0};
    for (unsigned page = 0; page < PAGES; page++)
        fetched[page] = false;
    n_fetched = n_hits = 0;
}

/* Read pages of a device from which whatever is to be fetched comes at once. */
static void reads(uint64_t first, uint32_t n)
{
    struct trend_run runs[TREND_RUNS];
    bool hit = fetched[first];
    for (uint64_t page = first; page < first + n; page++) {
        n_hits += fetched[page];
        fetched[page] = false;
    }
    unsigned n_runs = trend_access(&trend, PAGES, first, n, hit, runs), pages = 0;
    CHECK(n_runs <= TREND_RUNS);
    for (unsigned i = 0; i < n_runs; i++) {
        CHECK(runs[i].n >= 1 && runs[i].n <= TM_RUN_MAX);
        CHECK(runs[i].first < PAGES && runs[i].first + runs[i].n <= PAGES);
        for (uint64_t page = runs[i].first; page < runs[i].first + runs[i].n; page++) {
            n_fetched += !fetched[page];
            fetched[page] = true;
            pages++;
        }
    }
    CHECK(pages <= TREND_PAGES);
}

/* Whether all but a few at the beginning were hits, and little more was fetched than was read. */
static void check_that_all_hit(unsigned n)
{
    CHECK(n_hits >= n - 6 * (n / 500 + 1) && n_fetched <= n_hits + 3 * TREND_PAGES);
}

static void test_streams_of_any_stride_hit(void)
{
    static const int64_t strides[] = {1, -1, 2, 7, -7, 100, -100, 255, 256, 400, -400};
    for (size_t i = 0; i < sizeof strides / sizeof *strides; i++) {
        begin();
        for (int64_t step = 0; step < 500; step++)
            reads((uint64_t)(PAGES / 2 + strides[i] * step), 1);
        check_that_all_hit(500);
    }
}

static void test_requests_of_many_pages_hit(void)
{
    for (uint32_t n = 2; n <= TM_RUN_MAX; n *= 2) {
        begin();
        for (uint32_t step = 0; step < 200; step++)
            reads(1000 + step * n, n);
        CHECK(n_hits >= (200 - 6) * n);
        begin();
        for (uint32_t step = 0; step < 200; step++)
            reads(PAGES / 2 - step * n, n);
        CHECK(n_hits >= (200 - 6) * n);
    }
}

static void test_streams_in_turn_hit(void)
{
    for (unsigned streams = 2; streams < TREND_STREAMS; streams++) {
        begin();
        for (unsigned step = 0; step < 500; step++)
            for (unsigned stream = 0; stream < streams; stream++)
                reads(1000 + stream * 20000 + step * (stream % 3 + 1), 1);
        CHECK(n_hits >= (500 - 6) * streams);
    }
}

static void test_a_stream_hits_among_random_reads(void)
{
    begin();
    unsigned n_random = 0;
    for (unsigned step = 0; step < 2000; step++) {
        reads(1000 + step, 1);
        for (; below(4) == 0; n_random++)
            reads(below(PAGES), 1);
    }
    CHECK(n_random > 500 && n_hits > 1900);
}

static void test_random_reads_fetch_nothing(void)
{
    for (uint64_t range = 1000; range <= PAGES; range *= 4) {
        begin();
        for (unsigned step = 0; step < 10000; step++)
            reads(below(range), 1);
        CHECK(n_fetched <= 10000 / 50);
    }
}

/* What the stream ends before is in vain: about as much as it was long. */
static void test_short_streams_do_not_fetch_far(void)
{
    begin();
    for (unsigned step = 0; step < 500; step++) {
        uint64_t first = 64 * below(PAGES / 64 - 1);
        for (unsigned i = 0; i < 16; i++)
            reads(first + i, 1);
    }
    CHECK(n_fetched - n_hits <= n_hits && n_hits >= 500 * 16 / 2);
}

static void test_nothing_is_fetched_beyond_either_end(void)
{
    begin();
    for (uint64_t page = PAGES - 300; page < PAGES; page++)
        reads(page, 1);
    for (uint64_t page = 300; page-- > 0;)
        reads(page, 1);
    for (uint32_t step = 40; step-- > 0;)
        reads(step * 8, 8);
    CHECK(n_hits > 2 * 280);
}

static void test_a_page_again_and_again_is_no_stream(void)
{
    begin();
    for (unsigned step = 0; step < 100; step++)
        reads(7, 1);
    CHECK(n_fetched == 0);
}

/* Reads that miss although they had been asked for: less and less is asked for. */
static void test_what_never_comes_is_asked_for_less(void)
{
    struct trend_run runs[TREND_RUNS];
    begin();
    for (uint64_t page = 1000; page < 1300; page++)
        reads(page, 1);
    unsigned asked = 0;
    for (uint64_t page = 1300; page < 1400; page++) {
        asked = 0;
        for (unsigned n = trend_access(&trend, PAGES, page, 1, false, runs); n--;)
            asked += runs[n].n;
    }
    CHECK(asked <= 1);
}

int main(void)
{
    test_majorities_are_those_that_a_count_finds();
    test_streams_of_any_stride_hit();
    test_requests_of_many_pages_hit();
    test_streams_in_turn_hit();
    test_a_stream_hits_among_random_reads();
    test_random_reads_fetch_nothing();
    test_short_streams_do_not_fetch_far();
    test_nothing_is_fetched_beyond_either_end();
    test_a_page_again_and_again_is_no_stream();
    test_what_never_comes_is_asked_for_less();
    puts("ok");
    return 0;
}
