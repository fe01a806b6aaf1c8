/* SPDX-License-Identifier: BSD-3-Clause */
#include <Python.h>

#include "pin.h"

#include <pthread.h>
#include <stdbool.h>

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* PyGILState_Release in a key's destructor is a fatal error; this is what it would have done. */
static void let_go(void *state)
{
    if (!Py_IsInitialized())
        return;
    PyEval_RestoreThread(state);
    PyThreadState_Clear(state);
    PyThreadState_DeleteCurrent();
}

static void make_key(void) { pthread_key_create(&key, let_go); }

void tm_pin_thread(void)
{
    static _Thread_local bool pinned;
    if (pinned)
        return;
    pinned = true;
    pthread_once(&once, make_key);
    (void)PyGILState_Ensure();
    pthread_setspecific(key, PyThreadState_Get());
}
