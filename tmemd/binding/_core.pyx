# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, freethreading_compatible=False
"""A thin binding over the C page path: checks buffers and ranges, drops the GIL, turns errnos into exceptions."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EINVAL
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

import errno
import os
from typing import NamedTuple


cdef extern from "layout.h" nogil:
    struct tm_remote:
        uint64_t published
        uint64_t connections
        uint64_t connects
        uint64_t losses
        uint64_t time_outs
        uint64_t repeats
        uint64_t away_ms
        uint64_t overflow
        uint64_t export_bytes
        uint64_t abilities

cdef extern from *:
    """
    typedef _Atomic uint64_t atomic_word;
    static void store_word(atomic_word *word, uint64_t value) { atomic_store(word, value); }
    """
    ctypedef uint64_t atomic_word
    void store_word(atomic_word *word, uint64_t value)

cdef extern from "tmem.h" nogil:
    struct tm_device:
        pass

    struct store:
        pass

    struct tm_layout:
        uint64_t index_offset
        uint64_t data_offset
        uint64_t data_bytes
        uint64_t minimum

    struct tm_cgroup:
        int limit_fd
        int usage_fd

    enum tm_prefetch:
        TM_PREFETCH_NO
        TM_PREFETCH_AUTO
        TM_PREFETCH_YES

    struct tm_config:
        const char *name
        int pool_fd
        int file_fd
        int bitmap_fd
        uint64_t size
        uint64_t limit
        uint64_t region
        store *remote
        uint64_t bitmap_offset
        uint64_t file_bytes
        bint direct
        bint lost_zero
        bint durable
        bint ephemeral
        bint read_only
        atomic_word *fence
        uint32_t fence_ms
        tm_prefetch prefetch
        const tm_cgroup *cgroups
        size_t n_cgroups

    struct tm_extent:
        uint64_t offset
        uint64_t length
        bint zero

    int tm_layout_for(uint64_t size, tm_layout *layout)
    int tm_open(const tm_config *config, tm_device **device, char *error, size_t error_size)
    void tm_close(tm_device *device)
    int tm_read(tm_device *device, void *buffer, uint32_t count, uint64_t offset)
    int tm_write(tm_device *device, const void *buffer, uint32_t count, uint64_t offset, bint fua)
    int tm_zero(tm_device *device, uint64_t count, uint64_t offset, bint fua)
    int tm_trim(tm_device *device, uint64_t count, uint64_t offset, bint fua)
    int tm_flush(tm_device *device)
    int tm_cache(tm_device *device, uint64_t count, uint64_t offset)
    int tm_warm(tm_device *device, uint64_t first, uint64_t n)
    int tm_extents(tm_device *device, uint64_t count, uint64_t offset, tm_extent *extents, size_t *n)
    struct tm_filter:
        unsigned min_age
        bint raw_only
        bint bounded
        int use
        bint keep
        bint spares_ahead
        bint zeros

    int tm_demote(tm_device *device, uint64_t nbytes, tm_filter filter, uint64_t *freed)
    int tm_drain(tm_device *device)
    int tm_write_through(tm_device *device, bint on)
    int tm_pass_trims(tm_device *device, uint64_t *left)
    uint64_t tm_compact(tm_device *device, uint64_t moves)
    void tm_begin_generation(tm_device *device)
    void tm_publish_ages(tm_device *device)
    struct tm_saving:
        bint whole
        uint64_t page
        uint64_t records
        uint64_t pages
        uint64_t lost
        uint64_t damaged
        uint64_t first_damaged
        uint32_t crc

    struct tm_restoring:
        uint64_t device_pages
        uint32_t crc
        uint64_t page
        uint64_t records
        bint ended

    int tm_save(tm_device *device, tm_saving *saving, void *buffer, size_t size, size_t *used)
    int tm_restore(tm_device *device, tm_restoring *restoring, const void *buffer, size_t size, size_t *used)
    void tm_fence(tm_device *device, uint64_t at)
    int tm_stop(tm_device *device)
    void tm_go_on(tm_device *device)
    void tm_publish_pid(tm_device *device)
    uint64_t tm_free_slot_bytes(tm_device *device)
    uint64_t tm_staged(tm_device *device)
    tm_remote *tm_remote_state "tm_remote"(tm_device *device)
    void tm_note_failed_sync(tm_device *device)

cdef extern from *:
    """
    static void count_nbd(struct tm_device *device, uint64_t more)
    {
        atomic_fetch_add(&tm_doors(device)->nbd, more);
    }
    """
    void count_nbd(tm_device *device, uint64_t more) nogil

cdef extern from "vhost.h" nogil:
    struct vhost_config:
        tm_device *device
        const char *serial
        uint64_t size
        uint32_t block_bytes
        bint read_only
        uint32_t poll_us

    int vhost_serve(const vhost_config *config, int socket, char *error, size_t error_size)

cdef extern from "remote.h" nogil:
    enum:
        REMOTE_WHY

    struct remote:
        pass

    struct remote_config:
        const char *uri
        unsigned connections
        uint32_t timeout_ms

    struct remote_status:
        uint64_t size
        uint64_t abilities
        bint read_only
        bint can_flush
        bint can_zero
        unsigned connections
        uint64_t connects
        uint64_t losses
        uint64_t time_outs
        uint64_t repeats
        uint64_t away_ms
        char why[1]

    int remote_new(const remote_config *config, remote **remote)
    void remote_free(remote *remote)
    store *remote_store(remote *remote)
    int remote_connect(remote *remote, char *why, size_t why_size)
    int remote_know(remote *remote, uint64_t size, uint64_t abilities)
    int remote_expect(remote *remote, uint64_t offset, size_t length, const void *expected)
    int remote_read(remote *remote, uint64_t offset, size_t length, void *buffer)
    int remote_write(remote *remote, uint64_t offset, size_t length, const void *buffer, bint through)
    void remote_bound(remote *remote, uint32_t timeout_ms)
    void remote_hurry(remote *remote)
    void remote_look_after(remote *remote)
    void remote_get_status(remote *remote, remote_status *status)

cdef extern from "overflow.h" nogil:
    struct overflow:
        pass

    int overflow_new(remote *remote, int fd, uint64_t pages, overflow **made)
    void overflow_free(overflow *overflow)
    store *overflow_store(overflow *overflow)
    uint64_t overflow_file_bytes(uint64_t pages)
    uint64_t overflow_count(const overflow *overflow)
    int overflow_write_back(overflow *overflow)

cdef extern from "crc32c.h" nogil:
    uint32_t core_crc32c "crc32c"(uint32_t crc, const void *data, size_t length)

cdef extern from "pin.h":
    void tm_pin_thread()

# nbdkit-plugin.h
cdef enum:
    FLAG_FUA = 2
    EXTENT_HOLE_ZERO = 3
    EXTENTS_MAX = 256

cdef extern from "layout.h":
    unsigned TM_PROMOTE_AGE

PAGE = 4096
PROMOTE_AGE = TM_PROMOTE_AGE

PREFETCH = {"no": TM_PREFETCH_NO, "auto": TM_PREFETCH_AUTO, "yes": TM_PREFETCH_YES}

# Whether the callbacks pin their threads' Python state: only right for threads that nbdkit started.
cdef bint pinning = False


class Layout(NamedTuple):
    """Where the parts of a pool file lie, in bytes."""

    index_offset: int
    data_offset: int
    data_bytes: int
    minimum_bytes: int


def layout(uint64_t size):
    """The pool layout for a device of *size* bytes. Raises ValueError for 0 or more than 16 TiB."""
    cdef tm_layout answer
    if tm_layout_for(size, &answer):
        raise ValueError(f"a device of {size} bytes is not possible (1 byte to 16 TiB)")
    return Layout(answer.index_offset, answer.data_offset, answer.data_bytes, answer.minimum)


def crc32c(data):
    """CRC32C (Castagnoli, RFC 3720) of *data*."""
    cdef Py_buffer view
    cdef uint32_t answer
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    answer = core_crc32c(0, view.buf, <size_t>view.len)
    PyBuffer_Release(&view)
    return answer


def pin_threads():
    """Let the callbacks below keep each calling thread's Python state until that thread ends (see pin.h)."""
    global pinning
    pinning = True


cdef int fail(int code) except -1:
    raise OSError(code, os.strerror(code))


cdef int fail_at(int code, Device h, uint64_t count, uint64_t offset) except -1:
    # To the client each failure is EIO; the log tells what was behind it.
    raise OSError(errno.EIO, f"{h.name}: {count} bytes at {offset}: {os.strerror(code)}")


class RemoteStatus(NamedTuple):
    """How a remote is: sizes in bytes, times in seconds, counts since the process began."""

    size: int
    abilities: int
    read_only: bool
    can_flush: bool
    can_zero: bool
    connections: int
    connects: int
    losses: int
    time_outs: int
    repeats: int
    away: float
    why: str


cdef class Remote:
    """What an NBD server exports, as a device's file. Every method may be called from any thread, and before a fork."""

    cdef remote *remote

    def __cinit__(self, str uri, *, unsigned connections, double timeout):
        cdef bytes encoded = uri.encode()
        cdef remote_config config = remote_config(encoded, connections, <uint32_t>(timeout * 1000))
        cdef int code = remote_new(&config, &self.remote)
        if code:
            fail(code)

    def __dealloc__(self):
        if self.remote != NULL:
            remote_free(self.remote)

    def connect(self):
        """Connect within the time-out, as far as it is not. Raises OSError, which says what was wrong."""
        cdef char why[256]
        cdef int code
        with nogil:
            code = remote_connect(self.remote, why, sizeof(why))
        if code:
            raise OSError(code, (<bytes>why).decode(errors="replace") or os.strerror(code))

    def know(self, uint64_t size, uint64_t abilities):
        """Before it is connected: use only an export whose status said so. Raises OSError."""
        cdef int code = remote_know(self.remote, size, abilities)
        if code:
            fail(code)

    def expect(self, uint64_t offset, bytes content not None):
        """Use no server from now on that has not these bytes, at most 512, at *offset*."""
        cdef int code = remote_expect(self.remote, offset, len(content), <const char *>content)
        if code:
            fail(code)

    def read(self, uint64_t offset, size_t length):
        """*length* bytes at *offset*. Raises OSError."""
        cdef bytearray buffer = bytearray(length)
        cdef char *at = buffer
        cdef int code
        with nogil:
            code = remote_read(self.remote, offset, length, at)
        if code:
            fail(code)
        return bytes(buffer)

    def write(self, uint64_t offset, bytes content not None):
        """Write, durably. Raises OSError."""
        cdef const char *at = content
        cdef size_t length = len(content)
        cdef int code
        with nogil:
            code = remote_write(self.remote, offset, length, at, True)
        if code:
            fail(code)

    def bound(self, double timeout):
        """Have the time-out be no longer than that, in seconds: before others use it."""
        remote_bound(self.remote, <uint32_t>(timeout * 1000))

    def hurry(self):
        """Its device is being closed: nothing waits for longer than two seconds from now."""
        with nogil:
            remote_hurry(self.remote)

    def look_after(self):
        """Connect again if it is time to, and notice that the server has left. To be called about twice a second."""
        with nogil:
            remote_look_after(self.remote)

    @property
    def status(self):
        """How it is now."""
        cdef remote_status s
        remote_get_status(self.remote, &s)
        return RemoteStatus(
            s.size, s.abilities, s.read_only, s.can_flush, s.can_zero, s.connections, s.connects, s.losses, s.time_outs, s.repeats,
            s.away_ms / 1000, (<bytes><char *>s.why).decode(errors="replace"),
        )


cdef class Fence:
    """When a device stops being served, for its lease is over: at first, always."""

    cdef atomic_word at

    def __cinit__(self):
        store_word(&self.at, 0)

    def set(self, uint64_t at):
        """Have it fail from that time of CLOCK_BOOTTIME on, in nanoseconds."""
        store_word(&self.at, at)


cdef class Overflow:
    """A local file for what is written while a remote is away, and read from there until it was written back."""

    cdef overflow *overflow
    cdef Remote remote  # lives as long

    def __cinit__(self, Remote remote not None, int fd, uint64_t pages):
        cdef int code = overflow_new(remote.remote, fd, pages, &self.overflow)
        if code:
            fail(code)
        self.remote = remote

    def __dealloc__(self):
        if self.overflow != NULL:
            overflow_free(self.overflow)

    @staticmethod
    def file_bytes(uint64_t pages):
        """The length of such a file for a device of so many *pages*."""
        return overflow_file_bytes(pages)

    @property
    def count(self):
        """How many pages lie in it."""
        return overflow_count(self.overflow)

    def write_back(self):
        """Write some of them back. Raises OSError."""
        cdef int code
        with nogil:
            code = overflow_write_back(self.overflow)
        if code:
            fail(code)


cdef class Device:
    """One device: its pool, its backing file and its write-intent bitmap. Every method may be called from any thread."""

    cdef tm_device *device
    cdef readonly uint64_t size
    cdef readonly str name
    cdef Remote remote  # these live as long
    cdef Overflow overflow
    cdef Fence word

    def __cinit__(
        self, int pool_fd, int file_fd, int bitmap_fd, *, str name, uint64_t size, uint64_t limit, uint64_t region,
        uint64_t file_bytes, bint direct, bint lost_zero, bint durable, list cgroup,
        bint ephemeral=False, bint read_only=False, Remote remote=None, Overflow overflow=None,
        uint64_t bitmap_offset=0, Fence fence=None, double fence_wait=0, str prefetch="no",
    ):
        cdef char error[256]
        cdef bytes encoded = name.encode()
        cdef size_t n = len(cgroup)
        cdef int code
        cdef tm_cgroup *cgroups = <tm_cgroup *>calloc(n + 1, sizeof(tm_cgroup))
        cdef tm_config config
        cdef store *far = NULL
        cdef atomic_word *word = NULL
        if cgroups == NULL:
            raise MemoryError
        if remote is not None:
            far = remote_store(remote.remote)
        if overflow is not None:
            far = overflow_store(overflow.overflow)
        if fence is not None:
            word = &fence.at
        try:
            for i, (limit_fd, usage_fd) in enumerate(cgroup):
                cgroups[i] = tm_cgroup(limit_fd, usage_fd)
            config = tm_config(
                encoded, pool_fd, file_fd, bitmap_fd, size, limit, region,
                far, bitmap_offset, file_bytes, direct, lost_zero, durable, ephemeral,
                read_only, word, <uint32_t>(fence_wait * 1000), PREFETCH[prefetch], cgroups, n,
            )
            with nogil:
                code = tm_open(&config, &self.device, error, sizeof(error))
        finally:
            free(cgroups)
        if code == EINVAL:
            raise ValueError((<bytes>error).decode())
        if code:
            raise OSError(code, (<bytes>error).decode())
        self.size = size
        self.name = name
        self.remote, self.overflow = remote, overflow
        self.word = fence

    def __dealloc__(self):
        if self.device != NULL:
            tm_close(self.device)

    def close(self):
        """Unmap and free; descriptors stay open. Idempotent; the caller has ended all other calls."""
        cdef tm_device *device = self.device
        self.device = NULL
        if device != NULL:
            with nogil:
                tm_close(device)

    cdef tm_device *handle(self, uint64_t offset, uint64_t count) except NULL:
        """The open device, if it has [offset, offset + count)."""
        if self.device == NULL:
            fail(errno.EBADF)
        if offset > self.size or count > self.size - offset:
            fail(EINVAL)
        return self.device

    def publish_pid(self):
        """Note that this process serves the device from now on."""
        tm_publish_pid(self.handle(0, 0))

    def demote(self, uint64_t nbytes, *, unsigned min_age=0, bint raw_only=False, bint bounded=False):
        """Move the coldest of the pages chosen to the file until *nbytes* of records are gone; returns how many were."""
        cdef tm_device *device = self.handle(0, 0)
        cdef tm_filter chosen = tm_filter(min_age, raw_only, bounded, 0, False, False, False)
        cdef uint64_t freed
        cdef int code
        with nogil:
            code = tm_demote(device, nbytes, chosen, &freed)
        if code:
            fail(code)
        return freed

    def drain(self):
        """Demote everything, make the file durable and the bitmap clean. Puts are refused meanwhile. Raises OSError."""
        cdef tm_device *device = self.handle(0, 0)
        cdef int code
        with nogil:
            code = tm_drain(device)
        if code:
            fail(code)

    def write_through(self, bint on):
        """Be durable from now on, with everything in the file when this returns; or (not *on*) write back again."""
        cdef tm_device *device = self.handle(0, 0)
        cdef int code
        with nogil:
            code = tm_write_through(device, on)
        if code:
            fail(code)

    def warm(self, uint64_t first, uint64_t n):
        """Fetch *n* pages from *first* on ahead. Raises OSError; ENOSPC: there is no memory that nobody needs."""
        cdef tm_device *device = self.handle(first * PAGE, n * PAGE - PAGE + 1 if n else 0)
        cdef int code
        with nogil:
            code = tm_warm(device, first, n)
        if code:
            fail(code)

    def compact(self, uint64_t moves):
        """Compact and punch out free memory, moving at most *moves* records; returns the bytes given back."""
        cdef tm_device *device = self.handle(0, 0)
        cdef uint64_t punched
        with nogil:
            punched = tm_compact(device, moves)
        return punched

    def pass_trims(self):
        """Tell the store of some trimmed pages that it holds still; returns how many are left. Raises OSError."""
        cdef tm_device *device = self.handle(0, 0)
        cdef uint64_t left
        cdef int code
        with nogil:
            code = tm_pass_trims(device, &left)
        if code:
            fail(code)
        return left

    def begin_generation(self):
        """Begin the next coldness generation."""
        cdef tm_device *device = self.handle(0, 0)
        with nogil:
            tm_begin_generation(device)

    def publish_ages(self):
        """Publish in the statistics page what lies in tmem and in the file, by age."""
        cdef tm_device *device = self.handle(0, 0)
        with nogil:
            tm_publish_ages(device)

    def put_off(self, uint64_t at):
        """Of a device with a fence: set it, and say so in the pool."""
        tm_fence(self.handle(0, 0), at)

    def stop(self):
        """Have every request fail from now on; returns when those under way are done, and flushed. Raises OSError."""
        cdef tm_device *device = self.handle(0, 0)
        cdef int code
        with nogil:
            code = tm_stop(device)
        if code:
            fail(code)

    def go_on(self):
        """Take requests again."""
        tm_go_on(self.handle(0, 0))

    def count_nbd(self, int more):
        """Note that so many connections of NBD have come, or gone."""
        count_nbd(self.handle(0, 0), <uint64_t>more)

    def publish_remote(self, status, uint64_t overflow):
        """Note in the pool how the device's remote is, and how many pages are in its *overflow*."""
        cdef tm_remote *state = tm_remote_state(self.handle(0, 0))
        state.connections, state.connects, state.losses = status.connections, status.connects, status.losses
        state.time_outs, state.repeats = status.time_outs, status.repeats
        state.away_ms, state.overflow = <uint64_t>(status.away * 1000), overflow
        state.export_bytes, state.abilities = status.size, status.abilities
        state.published = 1
        tm_note_failed_sync(self.handle(0, 0))

    def serve_vhost(self, int socket, *, str serial, uint32_t block_bytes, bint read_only, uint32_t poll_us):
        """Serve a vhost-user-blk front end, at the other end of *socket*, until it leaves. Raises OSError."""
        cdef tm_device *device = self.handle(0, 0)
        cdef char error[256]
        cdef bytes encoded = serial.encode()
        cdef vhost_config config = vhost_config(device, encoded, self.size, block_bytes, read_only, poll_us)
        cdef int code
        with nogil:
            code = vhost_serve(&config, socket, error, sizeof(error))
        if code:
            raise OSError(code, (<bytes>error).decode() or os.strerror(code))

    def free_slot_bytes(self):
        """Bytes of the pool's memory that hold no live slot."""
        return tm_free_slot_bytes(self.handle(0, 0))

    def staged(self):
        """Pages that were read from the source, and are about to be put."""
        return tm_staged(self.handle(0, 0))


cdef class Saving:
    """The pages of a device on their way to a save file, from the first on."""

    cdef Device device
    cdef tm_saving state

    def __cinit__(self, Device device not None, *, bint whole, uint32_t crc):
        self.device = device
        self.state.whole = whole
        self.state.crc = crc

    def fill(self, buf):
        """Fill *buf* with records; returns of how many bytes, 0 at the end. Raises OSError; see `page`."""
        cdef Py_buffer view
        cdef size_t used = 0
        cdef int code
        cdef tm_device *device = self.device.handle(0, 0)
        PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        try:
            with nogil:
                code = tm_save(device, &self.state, view.buf, <size_t>view.len, &used)
        finally:
            PyBuffer_Release(&view)
        if code:
            fail(code)
        return used

    @property
    def page(self):
        return self.state.page

    @property
    def records(self):
        return self.state.records

    @property
    def pages(self):
        return self.state.pages

    @property
    def lost(self):
        return self.state.lost

    @property
    def damaged(self):
        return self.state.damaged

    @property
    def first_damaged(self):
        return self.state.first_damaged

    @property
    def crc(self):
        return self.state.crc


cdef class Restoring:
    """Records of a save file, checked from the first on, and on their way into a device, if there is one."""

    cdef Device device
    cdef tm_restoring state
    cdef readonly uint64_t taken

    def __cinit__(self, Device device, *, uint64_t pages, uint32_t crc):
        self.device = device
        self.state.device_pages = pages
        self.state.crc = crc

    def take(self, buf):
        """Take the whole records that *buf* begins with; returns their bytes. Raises OSError; see `page`."""
        cdef Py_buffer view
        cdef size_t used = 0
        cdef int code
        cdef tm_device *device = NULL if self.device is None else self.device.handle(0, 0)
        PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
        try:
            with nogil:
                code = tm_restore(device, &self.state, view.buf, <size_t>view.len, &used)
        finally:
            PyBuffer_Release(&view)
        self.taken += used
        if code:
            fail(code)
        return used

    @property
    def page(self):
        return self.state.page

    @property
    def records(self):
        return self.state.records

    @property
    def ended(self):
        return self.state.ended

    @property
    def crc(self):
        return self.state.crc


def pread(Device h not None, buf, uint64_t offset, flags):
    """Fill *buf* from the device."""
    cdef Py_buffer view
    cdef tm_device *device
    cdef int code
    if pinning:
        tm_pin_thread()
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE | PyBUF_WRITABLE)
    try:
        device = h.handle(offset, <uint64_t>view.len)
        with nogil:
            code = tm_read(device, view.buf, <uint32_t>view.len, offset)
    finally:
        PyBuffer_Release(&view)
    if code:
        fail_at(code, h, <uint64_t>len(buf), offset)


def pwrite(Device h not None, buf, uint64_t offset, uint32_t flags):
    """Write *buf* to the device."""
    cdef Py_buffer view
    cdef tm_device *device
    cdef int code
    if pinning:
        tm_pin_thread()
    PyObject_GetBuffer(buf, &view, PyBUF_SIMPLE)
    try:
        device = h.handle(offset, <uint64_t>view.len)
        with nogil:
            code = tm_write(device, view.buf, <uint32_t>view.len, offset, flags & FLAG_FUA)
    finally:
        PyBuffer_Release(&view)
    if code:
        fail_at(code, h, <uint64_t>len(buf), offset)


def flush(Device h not None, flags):
    """Write again what failed writes have left stale in the file; of durable devices, sync it."""
    cdef tm_device *device = h.handle(0, 0)
    cdef int code
    if pinning:
        tm_pin_thread()
    with nogil:
        code = tm_flush(device)
    if code:
        fail_at(code, h, h.size, 0)


def trim(Device h not None, uint64_t count, uint64_t offset, uint32_t flags):
    """Forget the whole pages of a range: they read as zeros."""
    cdef tm_device *device = h.handle(offset, count)
    cdef int code
    if pinning:
        tm_pin_thread()
    with nogil:
        code = tm_trim(device, count, offset, flags & FLAG_FUA)
    if code:
        fail_at(code, h, count, offset)


def zero(Device h not None, uint64_t count, uint64_t offset, uint32_t flags):
    """Make a range read as zeros."""
    cdef tm_device *device = h.handle(offset, count)
    cdef int code
    if pinning:
        tm_pin_thread()
    with nogil:
        code = tm_zero(device, count, offset, flags & FLAG_FUA)
    if code:
        fail_at(code, h, count, offset)


def cache(Device h not None, uint64_t count, uint64_t offset, flags):
    """Bring pages of a range that are in the file into tmem, as far as puts are accepted."""
    cdef tm_device *device = h.handle(offset, count)
    cdef int code
    if pinning:
        tm_pin_thread()
    with nogil:
        code = tm_cache(device, count, offset)
    if code:
        fail_at(code, h, count, offset)


def extents(Device h not None, uint64_t count, uint64_t offset, flags):
    """What lies in a range: (offset, length, type) from its start on, maybe not to its end."""
    cdef tm_extent found[EXTENTS_MAX]
    cdef size_t n = EXTENTS_MAX
    cdef tm_device *device = h.handle(offset, count)
    cdef int code
    if pinning:
        tm_pin_thread()
    with nogil:
        code = tm_extents(device, count, offset, found, &n)
    if code:
        fail(code)
    return [(found[i].offset, found[i].length, EXTENT_HOLE_ZERO if found[i].zero else 0) for i in range(n)]
