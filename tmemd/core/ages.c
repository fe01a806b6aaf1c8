/* SPDX-License-Identifier: BSD-3-Clause */
#include "ages.h"

#include "statistics.h"

/* Count n pages with this word: 1, or -1 for one that is not there any more. */
static void count(struct ages *ages, uint64_t word, int64_t n)
{
    unsigned generation = word_generation(word);
    if (word_kind(word) == TM_TMEM) {
        uint64_t bytes = (uint64_t)n * word_slot_size(word_length(word));
        stats_add(&ages->stored[generation], bytes);
        if (word_encoding(word) == TM_RAW)
            stats_add(&ages->raw[generation], bytes);
        if (word & TM_WORD_CLEAN)
            stats_add(&ages->clean[generation], bytes);
        if (word & TM_WORD_AGAIN) {
            stats_add(&ages->again[generation], bytes);
            stats_add(&ages->n_again, (uint64_t)n);
        }
    } else if (word_kind(word) == TM_FILE) {
        stats_add(&ages->in_file[generation], (uint64_t)n);
    }
}

void ages_change(struct ages *ages, uint64_t old, uint64_t new)
{
    if (word_same_age(old, new))
        return;
    count(ages, new, 1); /* first: no page may seem to be nowhere */
    count(ages, old, -1);
}
