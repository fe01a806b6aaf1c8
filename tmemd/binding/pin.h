/* SPDX-License-Identifier: BSD-3-Clause */
#pragma once

/* Keep the calling thread's Python state until the thread ends. nbdkit wraps each callback in
 * PyGILState_Ensure and Release; on a thread with no other hold that builds and destroys a thread
 * state for every request, which cuts 4 KiB writes at depth 32 from 190k/s to 60k/s. Call with the
 * GIL held, from threads that Python did not start. */
void tm_pin_thread(void);
