/* SPDX-License-Identifier: BSD-3-Clause */
/* Puts load on a block device through either of its doors, as one thread of its own: a
 * vhost-user-blk front end with no guest behind it, and an NBD client that waits, counts and
 * measures in the same way. Prints one line of JSON. Exit status: 0; 1 if a request failed or a
 * page was wrong; 2 if nothing could be measured. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "../content.h"
#include "common.h"
#include "door.h"
#include "ledger.h"
#include "load.h"
#include "memory.h"

static const char usage[] =
    "usage: frontend (--vhost SOCKET | --nbd SOCKET) [options]\n"
    "  --export NAME      NBD: the export (default: the empty name)\n"
    "  --queues N         vhost: virtqueues that requests are spread over (default 1)\n"
    "  --plain            vhost: without EVENT_IDX and INDIRECT_DESC\n"
    "  --mix R[:W[:Z]]    shares of reads, writes and write-zeroes (default 1:0:0)\n"
    "  --sequential       one block after the other, not random ones\n"
    "  --depth N          requests in flight, up to 128 (default 1)\n"
    "  --block BYTES      of each request (default 4096)\n"
    "  --first N          requests go to blocks from this one on (default 0)\n"
    "  --blocks N         and to so many (default: the rest of the device)\n"
    "  --seconds S        how long (default 1)\n"
    "  --count N          how many requests instead\n"
    "  --rate R           at most so many a second; 0: stay connected and ask for nothing\n"
    "  --corpus FILE      pages to write (default: made up)\n"
    "  --verify LEDGER    write pages that tell their number and version, check what is read;\n"
    "                     processes that share the file and the device check each other's\n"
    "  --seed N           of what is random (default 1)\n"
    "  --reconnect S      wait so long for a server that has gone, and go on\n"
    "  --spin             wait for answers without sleeping\n"
    "  --cpu N            run on that CPU\n"
    "  --pid PID          tell what CPU that process used meanwhile\n";

struct options {
    const char *vhost, *nbd, *export, *mix, *corpus, *verify;
    uint64_t queues, depth, block, first, blocks, count, seed, cpu, pid;
    double seconds, rate, reconnect;
    bool plain, sequential, spin, help;
};

enum { MOST_OPTIONS = 32 };
static const uint64_t NO_CPU = UINT64_MAX;

struct setting {
    const char *name;
    enum { TEXT, NUMBER, REAL, FLAG } kind;
    void *value;
};

static void set(const struct setting *setting, const char *text)
{
    char *end = "";

    if (setting->kind == TEXT)
        *(const char **)setting->value = text;
    else if (setting->kind == NUMBER)
        *(uint64_t *)setting->value = strtoull(text, &end, 10);
    else if (setting->kind == REAL)
        *(double *)setting->value = strtod(text, &end);
    else
        *(bool *)setting->value = true;
    if (*end)
        die(setting->name, "takes a number");
}

static void parse(int argc, char **argv, struct options *options)
{
    const struct setting settings[] = {
        {"vhost", TEXT, &options->vhost},
        {"nbd", TEXT, &options->nbd},
        {"export", TEXT, &options->export},
        {"queues", NUMBER, &options->queues},
        {"plain", FLAG, &options->plain},
        {"mix", TEXT, &options->mix},
        {"sequential", FLAG, &options->sequential},
        {"depth", NUMBER, &options->depth},
        {"block", NUMBER, &options->block},
        {"first", NUMBER, &options->first},
        {"blocks", NUMBER, &options->blocks},
        {"seconds", REAL, &options->seconds},
        {"count", NUMBER, &options->count},
        {"rate", REAL, &options->rate},
        {"corpus", TEXT, &options->corpus},
        {"verify", TEXT, &options->verify},
        {"seed", NUMBER, &options->seed},
        {"reconnect", REAL, &options->reconnect},
        {"spin", FLAG, &options->spin},
        {"cpu", NUMBER, &options->cpu},
        {"pid", NUMBER, &options->pid},
        {"help", FLAG, &options->help},
    };
    struct option known[MOST_OPTIONS] = {{0}};
    int found, which;

    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        known[i] = (struct option){settings[i].name, settings[i].kind != FLAG, NULL, 0};
    while ((found = getopt_long(argc, argv, "", known, &which)) == 0)
        set(&settings[which], optarg);
    if (found != -1 || optind != argc || options->help || !options->vhost == !options->nbd) {
        fputs(usage, stderr);
        exit(2);
    }
}

static void parse_mix(const char *text, unsigned *shares)
{
    if (sscanf(text, "%u:%u:%u", &shares[OP_READ], &shares[OP_WRITE], &shares[OP_ZERO]) < 1 ||
        shares[OP_READ] + shares[OP_WRITE] + shares[OP_ZERO] == 0)
        die("mix", "takes shares of reads, writes and write-zeroes");
}

static void check(const struct options *options)
{
    if (options->depth < 1 || options->depth > MAX_DEPTH)
        die("depth", "from 1 to 128");
    if (options->queues < 1 || options->queues > MAX_QUEUES)
        die("queues", "from 1 to 16");
    if (options->block == 0 || options->block > 1 << 20 || options->block % 512)
        die("block", "a multiple of 512, up to 1 MiB");
    if (options->verify && options->block % PAGE)
        die("verify", "takes whole pages");
}

static void run_on(unsigned cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) < 0)
        die("cpu", strerror(errno));
}

/* Pages to write lie in shared memory, as those of a guest do, and nobody copies them first. */
static void read_corpus(const char *path, struct load *load, uint64_t bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, load->corpus, bytes) != (ssize_t)bytes)
        die(path, strerror(errno));
    close(fd);
}

static uint64_t corpus_size(const char *path)
{
    enum { MADE_UP = 8 << 20, MOST = 1 << 30 };
    struct stat status;

    if (!path)
        return MADE_UP;
    if (stat(path, &status) < 0)
        die(path, strerror(errno));
    return status.st_size < MOST ? status.st_size / PAGE * PAGE : MOST;
}

static void lay_out(const struct options *options, struct memory *memory, struct load *load)
{
    enum { RINGS = 4 << 20 };
    uint64_t bytes = corpus_size(options->corpus);

    memory_open(memory, RINGS + bytes + (uint64_t)options->depth * (options->block + PAGE));
    load->corpus = memory_take(memory, bytes);
    load->corpus_pages = bytes / PAGE;
    if (load->corpus_pages <= options->block / PAGE)
        die("corpus", "is smaller than a block");
    if (options->corpus)
        read_corpus(options->corpus, load, bytes);
    else
        for (uint64_t page = 0; page < load->corpus_pages; page++)
            fill_page((uint64_t *)(load->corpus + page * PAGE), page, 1);
    load->requests = allocate(options->depth * sizeof *load->requests);
    for (unsigned i = 0; i < options->depth; i++) {
        load->requests[i].number = i;
        load->requests[i].buffer = memory_take(memory, options->block);
    }
}

static void connect_door(const struct options *options, struct memory *memory, struct load *load)
{
    struct door_config config = {.path = options->vhost ? options->vhost : options->nbd,
                                 .export = options->export,
                                 .memory = memory,
                                 .requests = load->requests,
                                 .depth = options->depth,
                                 .queues = options->queues,
                                 .spin = options->spin,
                                 .plain = options->plain};

    load->door = options->vhost ? vhost_door(&config) : nbd_door(&config);
}

static void choose_load(const struct options *options, struct load *load)
{
    uint64_t there = load->door->size / options->block;

    if (options->first >= there || options->blocks > there - options->first)
        die("first", "the device is smaller");
    load->first = options->first;
    load->blocks = options->blocks ? options->blocks : there - options->first;
    load->block = options->block;
    load->depth = options->depth;
    load->sequential = options->sequential;
    load->count = options->count;
    load->duration = options->seconds * 1e9;
    load->rate = options->rate;
    load->patience = options->reconnect;
    load->random = options->seed;
    parse_mix(options->mix, load->shares);
}

/* Of a process, all its threads, in ns; 0 for none. */
static uint64_t cpu_time(int pid)
{
    clockid_t clock;
    struct timespec time = {0};

    if (pid && (clock_getcpuclockid(pid, &clock) != 0 || clock_gettime(clock, &time) < 0))
        die("pid", "no such process");
    return time.tv_sec * UINT64_C(1000000000) + time.tv_nsec;
}

static void report(const struct result *result, uint64_t server, uint64_t own)
{
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"per_second\": %.1f, \"p50_ns\": %llu, "
           "\"p99_ns\": %llu, \"server_cpu_seconds\": %.6f, \"own_cpu_seconds\": %.6f, "
           "\"failed\": %llu, \"wrong\": %llu, \"returns\": %llu}\n",
           (unsigned long long)result->requests, result->elapsed / 1e9,
           result->requests / (result->elapsed / 1e9),
           (unsigned long long)latency_at(&result->latency, 0.5),
           (unsigned long long)latency_at(&result->latency, 0.99), server / 1e9, own / 1e9,
           (unsigned long long)result->failed, (unsigned long long)result->wrong,
           (unsigned long long)result->returns);
}

int main(int argc, char **argv)
{
    static struct result result;
    struct options options = {.export = "",
                              .mix = "1",
                              .queues = 1,
                              .depth = 1,
                              .block = PAGE,
                              .seed = 1,
                              .cpu = NO_CPU,
                              .seconds = 1,
                              .rate = -1};
    struct load load = {0};
    struct memory memory;
    struct ledger ledger;

    parse(argc, argv, &options);
    check(&options);
    if (options.cpu != NO_CPU)
        run_on(options.cpu);
    lay_out(&options, &memory, &load);
    connect_door(&options, &memory, &load);
    choose_load(&options, &load);
    if (options.verify) {
        ledger_open(&ledger, options.verify, load.door->size / PAGE);
        load.ledger = &ledger;
    }
    uint64_t server = cpu_time(options.pid), own = cpu_time(getpid());
    load_run(&load, &result);
    report(&result, cpu_time(options.pid) - server, cpu_time(getpid()) - own);
    return result.failed || result.wrong;
}
