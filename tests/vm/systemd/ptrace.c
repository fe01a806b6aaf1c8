/* SPDX-License-Identifier: BSD-3-Clause */
/* Lets User-Mode Linux run on a CPU whose XSAVE area is larger than its buffer for it (AMX):
 * preload this.
 *
 * Linux refuses PTRACE_SETREGSET with less than the whole area. What UML saved is padded to its
 * size with zeros, and of the components that its header (xstate_bv) names only those are kept that
 * lie within what UML saved.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { XSTATE_BV = 512, ROOM = 1 << 16 };
static const uint64_t KEPT = 0x2e7; /* x87, SSE, AVX, AVX-512, PKRU */

typedef long ptrace_call(enum __ptrace_request request, ...);

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    const pid_t pid = va_arg(arguments, pid_t);
    void *const address = va_arg(arguments, void *);
    void *const data = va_arg(arguments, void *);
    va_end(arguments);
    ptrace_call *const real = (ptrace_call *)dlsym(RTLD_NEXT, "ptrace");
    if (request != PTRACE_SETREGSET || (uintptr_t)address != NT_X86_XSTATE) {
        return real(request, pid, address, data);
    }
    static _Thread_local char area[ROOM];
    struct iovec whole = {area, sizeof area};
    const struct iovec *const given = data;
    if (real(PTRACE_GETREGSET, pid, address, &whole) || given->iov_len >= whole.iov_len) {
        return real(request, pid, address, data);
    }
    memset(area, 0, whole.iov_len);
    memcpy(area, given->iov_base, given->iov_len);
    uint64_t components;
    memcpy(&components, area + XSTATE_BV, sizeof components);
    components &= KEPT;
    memcpy(area + XSTATE_BV, &components, sizeof components);
    return real(request, pid, address, &whole);
}
