# SPDX-License-Identifier: BSD-3-Clause
"""Types of the binding over the C page path; `plugin/tmem.py` hands its callbacks on to nbdkit."""

from typing import NamedTuple

from typing_extensions import Buffer

PAGE: int  # bytes
PROMOTE_AGE: int  # generations: a page that comes back from the file when it is younger is put again

class Layout(NamedTuple):
    """Where the parts of a pool file lie, in bytes."""

    index_offset: int
    data_offset: int
    data_bytes: int
    minimum_bytes: int  # smallest limit and target: header, index, and some records

def layout(size: int) -> Layout:
    """The pool layout for a device of *size* bytes. Raises ValueError beyond 16 TiB."""

def crc32c(data: bytes | bytearray | memoryview) -> int:
    """CRC32C (Castagnoli, RFC 3720) of *data*."""

class RemoteStatus(NamedTuple):
    """How a remote is: sizes in bytes, times in seconds, counts since the process began."""

    size: int
    abilities: int  # for `Remote.know`
    read_only: bool
    can_flush: bool
    can_zero: bool
    connections: int  # now; 0: it is away
    connects: int
    losses: int  # of connections
    time_outs: int  # of requests
    repeats: int  # requests sent again after a loss
    away: float  # for how long
    why: str  # it could not be connected, last time

class Remote:
    """What an NBD server exports, as a device's file. Every method may be called from any thread, and before a fork.

    *uri*: as nbd_connect_uri(3) takes them. *connections*: at most so many (1 to 16), if the server allows for several.
    *timeout*: seconds that a request may take, connecting again included.
    """

    def __init__(self, uri: str, *, connections: int, timeout: float) -> None: ...
    def connect(self) -> None:
        """Connect within the time-out, as far as it is not. Raises OSError, which says what was wrong."""
    def know(self, size: int, abilities: int) -> None:
        """Before it is connected: use only an export whose status said so. Raises OSError."""
    def expect(self, offset: int, content: bytes) -> None:
        """Use no server from now on that has not these bytes, at most 512, at *offset*."""
    def read(self, offset: int, length: int) -> bytes:
        """*length* bytes at *offset*. Raises OSError."""
    def write(self, offset: int, content: bytes) -> None:
        """Write, durably. Raises OSError."""
    def bound(self, timeout: float) -> None:
        """Have the time-out be no longer than that, in seconds: before others use it."""
    def hurry(self) -> None:
        """Its device is being closed: nothing waits for longer than two seconds from now, but a change under way."""
    def look_after(self) -> None:
        """Connect again if it is time to, and notice that the server has left. To be called about twice a second."""
    @property
    def status(self) -> RemoteStatus:
        """How it is now."""

class Fence:
    """When a device stops being served, for its lease is over: at first, always."""

    def set(self, at: int) -> None:
        """Have it fail from that time of CLOCK_BOOTTIME on, in nanoseconds."""

class Overflow:
    """A local file for what is written while a remote is away, and read from there until it was written back.

    *fd*: of `file_bytes(pages)` bytes, whose first page is the caller's; it stays open as long. Every method may be
    called from any thread, but `write_back` from one at a time.
    """

    def __init__(self, remote: Remote, fd: int, pages: int) -> None: ...
    @staticmethod
    def file_bytes(pages: int) -> int:
        """The length of such a file for a device of so many *pages*."""
    @property
    def count(self) -> int:
        """How many pages lie in it."""
    def write_back(self) -> None:
        """Write some of them back. Raises OSError."""

class Device:
    """One device: its pool, its backing file and its write-intent bitmap. Every method may be called from any thread.

    The constructor attaches: it rebuilds free space from the index and gives back what no live word points at. Raises
    OSError, and ValueError for an index that contradicts itself.
    """

    def __init__(
        self,
        pool_fd: int,
        file_fd: int,  # -1: no backing file
        bitmap_fd: int,  # -1: no bitmap
        *,
        name: str,
        size: int,
        limit: int,
        region: int,
        file_bytes: int,  # how much of the backing file may be read and written
        direct: bool,  # file_fd is O_DIRECT; otherwise the page cache is dropped behind each transfer
        lost_zero: bool,
        durable: bool,
        ephemeral: bool = False,  # the file is the device; pages in tmem are copies, and nothing needs a bitmap
        read_only: bool = False,  # nothing more is read from it once somebody has changed it
        remote: Remote | None = None,  # instead of file_fd
        fence: Fence | None = None,  # beyond which it is not served; None: it has no lease
        fence_wait: float = 0,  # seconds that requests wait there
        overflow: Overflow | None = None,  # of that remote
        bitmap_offset: int = 0,  # where the bitmap begins, in bytes: in bitmap_fd, or where that is -1 in the remote
        prefetch: str = "no",  # whether pages are fetched ahead of reads: a key of PREFETCH
        cgroup: list[tuple[int, int]],  # (limit, usage) descriptors of each memory cgroup above us
    ) -> None: ...
    size: int  # in bytes
    name: str

    def publish_pid(self) -> None:
        """Note that this process serves the device from now on."""
    def close(self) -> None:
        """Unmap and free; descriptors stay open. Idempotent; the caller has ended all other calls."""
    def demote(self, nbytes: int, *, min_age: int = 0, raw_only: bool = False, bounded: bool = False) -> int:
        """Move the coldest of the pages chosen to the file until *nbytes* of records are gone; returns how many were.

        *min_age*: in generations, younger pages stay. *raw_only*: only incompressible pages go. *bounded*: no more are
        written than the control page's bound on demotion's writes allows.
        """
    def drain(self) -> None:
        """Demote everything, make the file durable and the bitmap clean. Puts are refused meanwhile. Raises OSError."""
    def write_through(self, on: bool) -> None:
        """Be durable from now on, with everything in the file when this returns; or (not *on*) write back again.

        Raises OSError, with ENODATA where pages were lost; the device is as it was then.
        """
    def warm(self, first: int, n: int) -> None:
        """Fetch *n* pages from *first* on ahead, as far as they are in the file alone, into memory that nobody needs.

        Raises OSError: ENOSPC where there is no such memory, or what the file failed with; ValueError beyond the end.
        """
    def compact(self, moves: int) -> int:
        """Compact for density and punch out free memory, moving at most *moves* records; returns bytes given back."""
    def pass_trims(self) -> int:
        """Tell the store of some trimmed pages that it holds still; returns how many are left. Raises OSError."""
    def begin_generation(self) -> None:
        """Begin the next coldness generation."""
    def publish_ages(self) -> None:
        """Publish in the statistics page what lies in tmem and in the file, by age."""
    def put_off(self, at: int) -> None:
        """Set its fence, as `Fence.set` does, and say so in the pool."""
    def stop(self) -> None:
        """Have every request fail from now on; returns when those under way are done, and flushed. Raises OSError."""
    def go_on(self) -> None:
        """Take requests again."""
    def count_nbd(self, more: int) -> None: ...
    def publish_remote(self, status: RemoteStatus, overflow: int) -> None:
        """Note in the statistics page how the device's remote is, and how many pages are in its *overflow*."""
    def serve_vhost(self, socket: int, *, serial: str, block_bytes: int, read_only: bool, poll_us: int) -> None: ...
    def free_slot_bytes(self) -> int:
        """Bytes of the pool's memory that hold no live slot."""
    def staged(self) -> int:
        """Pages that were read from the source, and are about to be put."""

class Saving:
    """The pages of a device on their way to a save file, from the first on. Nobody else uses the device meanwhile."""

    def __init__(self, device: Device, *, whole: bool, crc: int) -> None:
        """*whole*: all pages, not only what the file lacks; *crc*: CRC32C of what the file has already."""
    def fill(self, buf: Buffer) -> int:
        """Fill *buf*, of at least 1 MiB, with records; returns of how many bytes, 0 at the end.

        Raises OSError; `page` is then the one that could not be saved.
        """
    page: int  # the next
    records: int  # so far
    pages: int  # of these, with their content
    lost: int  # pages whose reads are errors
    damaged: int  # of these, found damaged just now
    first_damaged: int
    crc: int  # continued

class Restoring:
    """Records of a save file, checked from the first on, and on their way into a device, if there is one."""

    def __init__(self, device: Device | None, *, pages: int, crc: int) -> None:
        """*pages*: of the device they are of; *crc*: CRC32C of all before them."""
    def take(self, buf: Buffer) -> int:
        """Take the whole records that *buf* begins with; returns their bytes.

        Raises OSError, with EBADMSG for a damaged record; `page` is then the one it is about.
        """
    page: int  # the next
    records: int  # so far
    taken: int  # bytes, so far
    ended: bool  # the next record is no page's, but the last one
    crc: int  # continued over what was taken

# The callbacks of nbdkit's Python plugin, API version 2; the handle is a Device. All raise OSError, EIO with its cause.
def pread(h: Device, buf: Buffer, offset: int, flags: int) -> None: ...
def pwrite(h: Device, buf: Buffer, offset: int, flags: int) -> None: ...
def flush(h: Device, flags: int) -> None: ...
def trim(h: Device, count: int, offset: int, flags: int) -> None: ...
def zero(h: Device, count: int, offset: int, flags: int) -> None: ...
def cache(h: Device, count: int, offset: int, flags: int) -> None: ...
def extents(h: Device, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]: ...
def pin_threads() -> None:
    """Let the callbacks keep each thread's Python state until it ends: only for threads Python did not start."""
