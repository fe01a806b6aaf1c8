/* Replays a trace of overwrites on one candidate and prints what it took, as JSON. */
#include "store.h"

struct write {
    uint32_t page, content;
};

static struct write *trace;
static size_t trace_length;

static void trace_open(const char *path)
{
    struct stat st;
    int fd = check(open(path, O_RDONLY), path);
    check(fstat(fd, &st), path);
    trace_length = st.st_size / sizeof *trace;
    trace = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (trace == MAP_FAILED)
        die(path);
}

static void print_state(const struct store *store, const char *when)
{
    printf("\"used_%s\": %llu, ", when, (unsigned long long)arena_used(&store->arena));
    printf("\"payload_%s\": %llu, ", when, (unsigned long long)store->payload);
    printf("\"copies_%s\": %llu, ", when, (unsigned long long)store->copies);
}

static void settle(struct store *store, const char *when)
{
    print_state(store, when);
    double start = now();
    store->settle();
    char name[64];
    snprintf(name, sizeof name, "%s_settled", when);
    printf("\"seconds_%s\": %.3f, ", name, now() - start);
    print_state(store, name);
}

static double time_gets(struct store *store, const struct corpus *corpus, const uint32_t *content)
{
    uint8_t page[PAGE];
    uint64_t random = 1;
    for (uint32_t i = 0; i < corpus->pages; i++) {
        store->get(i, page);
        if (memcmp(page, corpus_page(corpus, content[i]), PAGE)) {
            fprintf(stderr, "%s: page %u is wrong\n", store->name, i);
            exit(1);
        }
    }
    double start = now();
    for (size_t i = 0; i < corpus->pages; i++)
        store->get(next_random(&random) % corpus->pages, page);
    return (now() - start) / corpus->pages * 1e9;
}

int main(int argc, char **argv)
{
    struct corpus corpus;
    if (argc != 5) {
        fprintf(stderr, "usage: replay slots|log PAGES TRACE BUDGET\n");
        return 2;
    }
    struct store *store = strcmp(argv[1], "log") ? &slots : &logged;
    corpus_open(&corpus, argv[2]);
    trace_open(argv[3]);
    uint32_t *content = malloc(corpus.pages * sizeof *content);
    store->open(corpus.pages, atof(argv[4]));
    printf("{\"store\": \"%s\", \"pages\": %zu, \"overwrites\": %zu, ", store->name, corpus.pages, trace_length);

    double start = now();
    for (uint32_t page = 0; page < corpus.pages; page++)
        store->put(content[page] = page, corpus_page(&corpus, page));
    printf("\"put_fresh_ns\": %.0f, ", (now() - start) / corpus.pages * 1e9);
    settle(store, "fresh");

    start = now();
    for (size_t i = 0; i < trace_length; i++)
        store->put(trace[i].page, corpus_page(&corpus, content[trace[i].page] = trace[i].content));
    printf("\"put_overwrite_ns\": %.0f, ", (now() - start) / trace_length * 1e9);
    settle(store, "after");
    printf("\"get_ns\": %.0f}\n", time_gets(store, &corpus, content));
    return 0;
}
