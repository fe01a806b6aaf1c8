/* SPDX-License-Identifier: BSD-3-Clause */
/* Puts load on an NBD server, with real pages: asynchronous libnbd on one connection.
 *
 * Reads commands from stdin, one a line, and answers each with one line of JSON:
 *
 *     fill DEPTH             write every page once, in order
 *     replay DEPTH TRACE     a trace: pairs of 32-bit words, the page and its content to write, or
 *                            all ones to read the page and compare it with what was written last
 *     write DEPTH SECONDS    random writes
 *     read DEPTH SECONDS     random reads
 *     within N PAGE          from now on random writes and reads go to the N pages from PAGE on
 *     verify DEPTH           read every page back and compare it with what was written last
 *     lz4 1 SECONDS          compress random pages of the corpus, on this thread, with no server
 *
 * Content is always a page of the corpus; which one was written where is remembered, so that verify
 * can tell. Two writes to one page are never in flight together.
 */
#include <errno.h>
#include <fcntl.h>
#include <libnbd.h>
#include <lz4.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, MAX_DEPTH = 128, BOUND = LZ4_COMPRESSBOUND(PAGE) };

#define READ_BACK UINT32_MAX /* in a trace, for content */

struct request {
    uint8_t *buffer; /* for reads */
    uint64_t page, started;
};

struct run {
    bool write, verify;
    uint64_t limit;            /* requests; 0: until the deadline */
    uint64_t deadline;         /* in ns */
    const struct visit *order; /* NULL: random pages with random content */
};

struct visit {
    uint32_t page, content;
};

static struct nbd_handle *nbd;
static const uint8_t *corpus;
static uint64_t corpus_pages, pages;    /* of the corpus; of the device */
static uint64_t first_random, n_random; /* pages that random requests go to */
static uint32_t *content;               /* which page of the corpus was written where */
static bool *in_flight;                 /* pages being written, or read back */
static struct request requests[MAX_DEPTH];
static unsigned free_requests[MAX_DEPTH], n_free;
static uint32_t *latencies; /* of the current run, in ns */
static uint64_t n_latencies, latency_room;
static uint64_t random_state = 1;

static _Noreturn void die(const char *what, const char *why)
{
    fprintf(stderr, "loader: %s: %s\n", what, why);
    exit(1);
}

static uint64_t now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* splitmix64, scaled to 0 .. below - 1 */
static uint64_t random_below(uint64_t below)
{
    uint64_t z = (random_state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return (unsigned __int128)(z ^ (z >> 31)) * below >> 64;
}

static const uint8_t *corpus_page(uint64_t page) { return corpus + page * PAGE; }

static void note_latency(uint64_t ns)
{
    if (n_latencies == latency_room) {
        latency_room = latency_room ? latency_room * 2 : 1 << 20;
        latencies = realloc(latencies, latency_room * sizeof *latencies);
        if (!latencies)
            die("latencies", strerror(errno));
    }
    latencies[n_latencies++] = ns > UINT32_MAX ? UINT32_MAX : ns;
}

static int finish(void *request_, int *error)
{
    struct request *request = request_;
    if (*error)
        die("request failed", strerror(*error));
    note_latency(now(CLOCK_MONOTONIC) - request->started);
    in_flight[request->page] = false;
    free_requests[n_free++] = request - requests;
    return 1; /* retire the command */
}

static int finish_verified(void *request_, int *error)
{
    struct request *request = request_;
    if (!*error && memcmp(request->buffer, corpus_page(content[request->page]), PAGE)) {
        fprintf(stderr, "loader: page %llu is wrong\n", (unsigned long long)request->page);
        exit(3);
    }
    return finish(request, error);
}

static void submit(const struct run *run, struct visit visit)
{
    struct request *request = &requests[free_requests[--n_free]];
    bool write = run->write && visit.content != READ_BACK,
         verify = run->verify || (run->write && !write);
    nbd_completion_callback done = {.callback = verify ? finish_verified : finish,
                                    .user_data = request};
    int64_t cookie;
    request->page = visit.page;
    request->started = now(CLOCK_MONOTONIC);
    in_flight[visit.page] = run->write || verify;
    if (write) {
        content[visit.page] = visit.content;
        cookie = nbd_aio_pwrite(nbd, corpus_page(visit.content), PAGE, (uint64_t)visit.page * PAGE,
                                done, 0);
    } else {
        cookie = nbd_aio_pread(nbd, request->buffer, PAGE, (uint64_t)visit.page * PAGE, done, 0);
    }
    if (cookie < 0)
        die("cannot send", nbd_get_error());
}

static void poll_once(void)
{
    if (nbd_poll(nbd, -1) < 0)
        die("connection", nbd_get_error());
}

/* A visit whose page no write is in flight to. */
static struct visit next_visit(const struct run *run, uint64_t sent)
{
    struct visit visit;
    if (run->order) {
        visit = run->order[sent];
        while (in_flight[visit.page])
            poll_once();
        return visit;
    }
    do
        visit = (struct visit){first_random + random_below(n_random), random_below(corpus_pages)};
    while (in_flight[visit.page]);
    return visit;
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void report(const char *op, unsigned depth, uint64_t ns)
{
    static const double percentiles[] = {50, 90, 99, 99.9};
    qsort(latencies, n_latencies, sizeof *latencies, compare);
    printf("{\"op\": \"%s\", \"depth\": %u, \"ops\": %llu, \"seconds\": %.6f, \"latency_ns\": {",
           op, depth, (unsigned long long)n_latencies, ns / 1e9);
    for (size_t i = 0; i < sizeof percentiles / sizeof *percentiles; i++)
        printf("%s\"%g\": %u", i ? ", " : "", percentiles[i],
               latencies[(uint64_t)((n_latencies - 1) * percentiles[i] / 100)]);
    printf("}}\n");
}

static void perform(const char *op, const struct run *run, unsigned depth)
{
    if (depth < 1 || depth > MAX_DEPTH)
        die("depth", "must be 1 to 128");
    n_free = 0;
    while (n_free < depth) {
        free_requests[n_free] = n_free;
        n_free++;
    }
    n_latencies = 0;
    uint64_t sent = 0, start = now(CLOCK_MONOTONIC);
    for (;;) {
        while (n_free &&
               (run->limit ? sent < run->limit : now(CLOCK_MONOTONIC) < start + run->deadline))
            submit(run, next_visit(run, sent++));
        if (n_free == depth)
            break;
        poll_once();
    }
    report(op, depth, now(CLOCK_MONOTONIC) - start);
}

/* Every page once, in order; page p gets content p. */
static void perform_all(const char *op, struct run run, unsigned depth)
{
    struct visit *order = malloc(pages * sizeof *order);
    if (!order)
        die("order", strerror(errno));
    for (uint64_t page = 0; page < pages; page++)
        order[page] = (struct visit){page, page % corpus_pages};
    run.order = order;
    run.limit = pages;
    perform(op, &run, depth);
    free(order);
}

static const void *map_file(const char *path, size_t *bytes)
{
    struct stat st;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &st) < 0)
        die(path, strerror(errno));
    void *map = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (map == MAP_FAILED)
        die(path, strerror(errno));
    close(fd);
    *bytes = st.st_size;
    return map;
}

static void replay(const char *path, unsigned depth)
{
    size_t bytes;
    const struct visit *trace = map_file(path, &bytes);
    struct run run = {.write = true, .limit = bytes / sizeof *trace, .order = trace};
    for (uint64_t i = 0; i < run.limit; i++)
        if (trace[i].page >= pages ||
            (trace[i].content >= corpus_pages && trace[i].content != READ_BACK))
            die(path, "a page outside the device or the corpus");
    perform("replay", &run, depth);
    munmap((void *)trace, bytes);
}

/* Random pages, as the load has them, and in the cache, as a server finds them: only compressing
 * them is timed. */
static void bare_lz4(double seconds)
{
    enum { BATCH = 16 };
    static uint8_t batch[BATCH][PAGE];
    static char out[BOUND];
    uint64_t done = 0, bytes = 0, spent = 0;
    while (spent < seconds * 1e9) {
        for (unsigned i = 0; i < BATCH; i++)
            memcpy(batch[i], corpus_page(random_below(corpus_pages)), PAGE);
        uint64_t start = now(CLOCK_THREAD_CPUTIME_ID);
        for (unsigned i = 0; i < BATCH; i++, done++)
            bytes += LZ4_compress_default((const char *)batch[i], out, PAGE, BOUND);
        spent += now(CLOCK_THREAD_CPUTIME_ID) - start;
    }
    printf("{\"op\": \"lz4\", \"ops\": %llu, \"seconds\": %.6f, \"bytes_per_page\": %.1f}\n",
           (unsigned long long)done, spent / 1e9, (double)bytes / done);
}

static void within(uint64_t n, uint64_t first)
{
    if (n == 0 || first >= pages || n > pages - first)
        die("within", "pages outside the device");
    first_random = first;
    n_random = n;
    printf("{\"op\": \"within\"}\n");
}

static void obey(const char *line)
{
    char op[16] = "", argument[1024] = "";
    unsigned depth = 0;
    if (sscanf(line, "%15s %u %1023[^\n]", op, &depth, argument) < 2)
        die("bad command", line);
    struct run timed = {.write = !strcmp(op, "write"), .deadline = atof(argument) * 1e9};
    if (!strcmp(op, "fill"))
        perform_all(op, (struct run){.write = true}, depth);
    else if (!strcmp(op, "verify"))
        perform_all(op, (struct run){.verify = true}, depth);
    else if (!strcmp(op, "replay"))
        replay(argument, depth);
    else if (!strcmp(op, "write") || !strcmp(op, "read"))
        perform(op, &timed, depth);
    else if (!strcmp(op, "within"))
        within(depth, strtoull(argument, NULL, 10));
    else if (!strcmp(op, "lz4"))
        bare_lz4(atof(argument));
    else
        die("unknown command", line);
    fflush(stdout);
}

static void connect_to(const char *socket)
{
    nbd = nbd_create();
    if (!nbd || nbd_connect_unix(nbd, socket) < 0)
        die(socket, nbd_get_error());
    int64_t size = nbd_get_size(nbd);
    if (size < PAGE)
        die(socket, "smaller than a page");
    pages = n_random = size / PAGE;
    content = calloc(pages, sizeof *content);
    in_flight = calloc(pages, sizeof *in_flight);
    if (!content || !in_flight)
        die("memory", strerror(errno));
    for (unsigned i = 0; i < MAX_DEPTH; i++)
        requests[i].buffer = aligned_alloc(PAGE, PAGE);
}

int main(int argc, char **argv)
{
    if (argc != 3 || !strcmp(argv[1], "--help")) {
        fprintf(stderr, "usage: loader SOCKET PAGES <commands (see loader.c)\n");
        return 2;
    }
    size_t corpus_bytes;
    corpus = map_file(argv[2], &corpus_bytes);
    corpus_pages = corpus_bytes / PAGE;
    connect_to(argv[1]);
    char line[2048];
    while (fgets(line, sizeof line, stdin))
        obey(line);
    nbd_shutdown(nbd, 0);
    nbd_close(nbd);
    return 0;
}
