/* The file is made to hold what it lacks, so that the bitmap can be cleared, or a flush be
 * acknowledged. Under demote_lock; I/O locks are held over each write. */
#pragma once

#include "state.h"

/* Write the zeros that the file lacks, and clear the bits of all regions in which the file then
 * holds everything, durably, and nobody has changed a page meanwhile. */
int clean_regions(struct tm_device *device);
/* Make the file hold the pages that are written through as they are, durably, if any is amiss: a
 * write that has failed, or was killed, leaves either content there, and the bitmap does not say
 * so. 0 or an errno. */
int clean_mend(struct tm_device *device);
