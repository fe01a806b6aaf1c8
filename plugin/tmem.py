# SPDX-License-Identifier: BSD-3-Clause
"""tmem: devices that keep what they can in RAM, for nbdkit's Python plugin.

  nbdkit [-U SOCKET] python tmem.py name=NAME size=SIZE backing=FILE|none limit=SIZE [KEY=VALUE ...]
  nbdkit [-U SOCKET] python tmem.py name=NAME source=FILE limit=SIZE [write=through] [KEY=VALUE ...]

The first is a swap device, of which the backing file takes what RAM does not. The second is a cache device: its content
is another file, such as a golden image, of which RAM holds copies that may go at any moment.

Each name= begins a device; the keys after it are that device's. Clients choose one by its name as the NBD export name;
a server of one device has it as its default export. Sizes are 4096, 512M, 1.5G (powers of 1024).
nbdkit's own --help cannot show these keys; --dump-plugin prints this text.

  name=NAME         the device's name: 1 to 63 letters, digits, '_', '.' and '-'
  size=SIZE         its size, a multiple of 512 (with source=: the source's)
  backing=FILE|URI  file, block device or NBD server's export (nbd://HOST/NAME, nbds://, nbd+unix:///NAME?socket=PATH)
                    that takes what RAM does not; 'none': RAM only, refused writes are errors
  source=FILE|URI   likewise, that is the device
  write=no|through  whether a device with source= may be written: no (default): many clients read it, and if somebody
                    changes the file, reads that miss are errors; through: a write reaches the source first, and FLUSH
                    and FUA sync it
  limit=SIZE        how much RAM its pool may take at most (optional with tmemd=)
  pools=DIR         directory on a tmpfs for the pool, DIR/NAME.pool (default: /dev/shm/tmem-UID)
  tmemd=SOCKET      get the pool from the tmemd that listens there, and let it set the target; with pools= as well, a
                    pool that is there already is found without it
  bitmap=FILE|inside  the write-intent bitmap, which says after the host died what of the backing file can be trusted
                    (default: the backing file's name with .map); inside: in a tail at its end, with a lease that lets
                    one host at a time have the device (the default for what is no file)
  standby=yes|no    begin although another host has the device (default: no); the first request that needs it has that
                    one let go of it, which it does as a durable device, or once it was handed over: for live migration
  lease=SECONDS     how long other hosts see nothing of this one before they take the device (default: 20, and with a
                    server that may be away longer, twice that time and 10); half of it after a renewal this host stops
  lost=error|zero   how pages read that were lost with the host: as errors (default) or as zeros
  flush=none|durable  durable: writes reach the file before they are acknowledged, and FLUSH and FUA sync it;
                    none (default): FLUSH and FUA are acknowledged at once, for swap needs no more
  clients=one|any   how many clients may have it open at a time (default: one, with any number of connections; two that
                    write make each other's pages wrong; any where nobody can write). One client is a process of this
                    machine, or a remote address
  reserve=yes|no    whether to reserve the backing file's blocks when it is created (default: yes)
  watermark=N%      how much of its target is kept free for pages to come: while the guest swaps, cold pages are moved
                    to the file ahead of need (default: 5%); 0%: none, pages are refused when it is full
  prefetch=auto|no|yes  whether pages are fetched ahead of reads, along the trend of what was read: while a read from
                    the file takes more than 0.3 ms on the mean (auto, the default), never, or always
  warm=FILE         a list of pages, as 'tmemctl hot' prints it: a device that begins with nothing in RAM fetches them
                    ahead, beside its requests, as far as there is room that nobody needs
  vhost=SOCKET      listen there as well, as a vhost-user-blk back end: guests reach the device through memory that they
                    share, faster than through NBD
  timeout=SECONDS   how long a request to an NBD server may take, connecting again included (default: 30)
  overflow=FILE     a local file that takes what RAM does not while that server is away; it is written back afterwards
  connections=N     at most so many connections to it (default: 4), where it says that it sees to all of them together
  poll=MICROSECONDS how long a queue of a vhost= client may be watched before its thread sleeps (default: 50; 0: never);
                    it is watched only as long as that pays

map= and headroom= are the old names of bitmap= and watermark=; they go with the next release.
nbdkit -v shows what was found when a device was opened, each new target, and each round of demotion.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import socket
import sys
import traceback
from pathlib import Path
from traceback import format_exception
from types import TracebackType
from typing import NoReturn

import nbdkit

# Installed, it lies inside the package, and beside that is what the package needs: nbdkit's Python looks nowhere there.
if (Path(__file__).parents[1] / "py.typed").exists():
    sys.path.insert(0, str(Path(__file__).parents[2]))

try:
    from tmemd.binding import _core
    from tmemd.binding._core import cache, extents, flush, pread, pwrite, trim, zero  # noqa: F401 - callbacks
    from tmemd.device import watermark
    from tmemd.device.clients import EVERYBODY, InUseError
    from tmemd.device.config import INSIDE, POLL_US, DeviceConfig, Uri, parse_place
    from tmemd.device.serve import ServedDevice, check_together
    from tmemd.device.source import size_of
    from tmemd.device.standby import CALLBACKS, Handle, StandbyDevice, open_or_stand_by
    from tmemd.sizes import parse_size
    from tmemd.store.poolfile import PoolError
    from tmemd.system import peer
except ModuleNotFoundError as error:
    hint = "install tmemd, or put the bin directory of its virtual environment (.venv/bin) first on PATH"
    print(f"nbdkit: tmem: error: {error}: {hint}", file=sys.stderr, flush=True)
    os._exit(1)

API_VERSION = 2

KEYS = (
    "size", "backing", "source", "write", "limit", "pools", "tmemd", "bitmap", "lost", "flush", "clients", "reserve",
    "watermark", "vhost", "poll", "prefetch", "timeout", "connections", "overflow", "lease",
    "standby", "warm",
)  # fmt: skip
OLD_KEYS = {"map": "bitmap", "headroom": "watermark"}
MAX_REQUEST = 1 << 20  # nbdkit keeps a buffer of the largest request for each of a connection's threads
# Seconds a thread waits for the GIL before it urges the holder, who lets go in microseconds anyhow. With 100 clients of
# 16 threads each, Python's own 5 ms cost 180 to 730 us of CPU per 4 KiB request, 50 ms 54 to 61, 1 s 60 to 94.
SWITCH_INTERVAL = 0.05

# nbdkit tells its plugins who their client is, but not through its module for Python.
_nbdkit = ctypes.CDLL(None)
_nbdkit.nbdkit_peer_pid.restype = ctypes.c_int64
SOCKADDR_BYTES = 128  # of a struct sockaddr_storage

_given: list[dict[str, str]] = []
_served: dict[str, ServedDevice | StandbyDevice] = {}


def _log(message: str) -> None:
    """One line in nbdkit's log, where that is its standard error."""
    print(f"nbdkit: tmem: {message}", file=sys.stderr, flush=True)


def _stop(message: object) -> NoReturn:
    """End nbdkit with one line: an exception would add a traceback that says nothing to a user."""
    _log(f"error: {message}")
    os._exit(1)


def _format_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> list[str]:
    """One line for what is no fault of ours: clients that are refused, and requests that fail."""
    return [error.strerror or str(error)] if isinstance(error, OSError) else format_exception(kind, error, trace)


# nbdkit looks it up by this name for whatever a callback raises, and logs what it returns (plugins/python/errors.c). It
# offers no other way to its log: a line of our own on standard error would not reach syslog.
traceback.format_exception = _format_exception  # type: ignore[assignment]


def dump_plugin() -> None:
    """Say what the plugin takes (nbdkit --dump-plugin): in lines of KEY=VALUE for programs, then for people."""
    print("tmem_keys=name," + ",".join(KEYS))
    print(f"tmem_max_request={MAX_REQUEST}")
    for line in (__doc__ or "").splitlines():
        print(f"# {line}".rstrip())


def config(key: str, value: str) -> None:
    """Take one key; name= begins a device."""
    if key == "name":
        if not value:
            _stop("name= is empty")
        if any(device["name"] == value for device in _given):
            _stop(f"name={value}: two devices have this name")
        _given.append({"name": value})
        return
    new = OLD_KEYS.get(key, key)
    if new not in KEYS:
        _stop(f"unknown key {key}=; known are name, {', '.join(KEYS)}")
    if not _given:
        _stop(f"{key}={value}: no name= before it says whose it is")
    device = _given[-1]
    if not value:
        _stop(f"{device['name']}: {key}= is empty")
    if new in device:
        _stop(f"{device['name']}: {new}= is given twice")
    if new != key:
        _log(f"{key}= is called {new}= now")
    device[new] = value


def _size(device: dict[str, str], key: str) -> int | None:
    if key not in device:
        return None
    try:
        return parse_size(device[key])
    except ValueError as error:
        _stop(f"{device['name']}: {key}={error}")


def _path(device: dict[str, str], key: str) -> Path | None:
    # nbdkit changes directory to / before the plugin opens anything.
    return Path(device[key]).absolute() if key in device else None


def _place(device: dict[str, str], key: str) -> Path | Uri | None:
    return parse_place(device[key]) if key in device else None


def _one_of(device: dict[str, str], key: str, default: str, *others: str) -> str:
    value = device.get(key, default)
    if value not in (default, *others):
        _stop(f"{device['name']}: {key}={value} is none of {default}, {', '.join(others)}")
    return value


def _choice(device: dict[str, str], key: str, default: str, other: str) -> bool:
    """Whether it is the other one."""
    value = device.get(key, default)
    if value not in (default, other):
        _stop(f"{device['name']}: {key}={value} is neither {default} nor {other}")
    return value == other


def _percent(device: dict[str, str], key: str, default: int) -> int:
    text = device.get(key, f"{default}%")
    if not re.fullmatch(r"[0-9]{1,3}%?", text):
        _stop(f"{device['name']}: {key}={text} is not a percentage such as {default}%")
    return int(text.rstrip("%"))


def _number(device: dict[str, str], key: str, default: int, what: str) -> int:
    text = device.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,5}", text):
        _stop(f"{device['name']}: {key}={text} is not a number{what} such as {default}")
    return int(text)


def _seconds(device: dict[str, str], key: str, default: float) -> float:
    text = device.get(key, str(default))
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", text):
        _stop(f"{device['name']}: {key}={text} is not a number of seconds such as {default:g}")
    return float(text)


def _device_size(device: dict[str, str], source: Path | Uri | None) -> int:
    size = _size(device, "size")
    if source is None:
        if size is None or "backing" not in device:
            _stop(f"{device['name']}: {'size' if size is None else 'backing (or source)'}= is missing")
        return size
    if size is not None or "backing" in device:
        _stop(f"{device['name']}: {'backing' if size is None else 'size'}= is not for devices with source=")
    try:
        return size_of(source)
    except PoolError as error:
        _stop(f"{device['name']}: {error}")


def _parse(device: dict[str, str]) -> DeviceConfig:
    source = _place(device, "source")
    write_through = _choice(device, "write", "no", "through")
    only_read = source is not None and not write_through
    return DeviceConfig(
        name=device["name"],
        size=_device_size(device, source),
        backing=None if device.get("backing", "none") == "none" else _place(device, "backing"),
        source=source,
        write_through=write_through,
        limit=_size(device, "limit"),
        pools=_path(device, "pools"),
        tmemd=_path(device, "tmemd"),
        bitmap=None if device.get("bitmap") == INSIDE else _path(device, "bitmap"),
        inside=device.get("bitmap") == INSIDE,
        lease=_seconds(device, "lease", 0) or None,
        standby=_choice(device, "standby", "no", "yes"),
        lost_zero=_choice(device, "lost", "error", "zero"),
        durable=_choice(device, "flush", "none", "durable"),
        shared=_choice(device, "clients", "one", "any") or (only_read and "clients" not in device),
        reserve=not _choice(device, "reserve", "yes", "no"),
        prefetch=_one_of(device, "prefetch", "auto", "no", "yes"),
        watermark=_percent(device, "watermark", watermark.DEFAULT_PERCENT),
        vhost=_path(device, "vhost"),
        poll_us=_number(device, "poll", POLL_US, " of microseconds"),
        timeout=_seconds(device, "timeout", DeviceConfig.timeout),
        overflow=_path(device, "overflow"),
        warm=_path(device, "warm"),
        connections=_number(device, "connections", DeviceConfig.connections, ""),
    )


_configs: list[DeviceConfig] = []


def config_complete() -> None:
    """Check all that can be checked without opening anything."""
    if not _given:
        _stop("no device: name=NAME size=SIZE backing=FILE|none limit=SIZE is needed")
    _configs.extend(_parse(device) for device in _given)
    try:
        check_together(_configs)
    except PoolError as error:
        _stop(error)


def thread_model() -> int:
    """Requests run in parallel: the page path drops the GIL and orders what must be ordered."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def _raise_file_limit() -> None:
    """Each device takes up to about ten descriptors and each client three; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def get_ready() -> None:
    """Open every device while an error can still be an exit status; locks and shared mappings survive nbdkit's fork."""
    _raise_file_limit()
    try:
        for served in open_or_stand_by(_configs, debug=nbdkit.debug):
            _served[served.config.name] = served
            served.before_fork()
            if isinstance(served, StandbyDevice):
                globals().update(CALLBACKS)  # nbdkit looks them up anew for each request
    except PoolError as error:
        _stop(error)


def after_fork() -> None:
    """Start what does not survive a fork."""
    _core.pin_threads()
    sys.setswitchinterval(SWITCH_INTERVAL)
    for served in _served.values():
        served.start(_log)


def cleanup() -> None:
    """Let go of every device; their pools stay for whoever attaches next."""
    for served in _served.values():
        served.close()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:  # noqa: ARG001
    """Every device, by name."""
    return [(name, _describe(served.config)) for name, served in _served.items()]


def _describe(config: DeviceConfig) -> str:
    return "tmem cache device" if config.source else "tmem swap device"


def default_export(readonly: bool, is_tls: bool) -> str:  # noqa: ARG001
    """The device that a client gets who names none: the only one, or none where a choice could be wrong."""
    return next(iter(_served)) if len(_served) == 1 else ""


def open(readonly: bool) -> Handle:  # noqa: A001
    """The device a client asks for. Its name is only looked up, never made into a path."""
    name = nbdkit.export_name() or default_export(readonly, False)
    if name not in _served:
        raise ConnectionRefusedError(f"there is no device {name[:64]!r}; this server has {', '.join(_served)}")
    served = _served[name]
    try:
        served.clients.enter(EVERYBODY if readonly or served.config.shared else _peer())
    except InUseError as holder:
        raise ConnectionRefusedError(f"{name} is in use by {holder}: one client at a time, or clients=any") from None
    served.core.count_nbd(1)
    return served.core


def close(h: Handle) -> None:
    """A connection has ended; nbdkit calls this when all its requests are done."""
    h.count_nbd(-1)
    _served[h.name].clients.leave()


def _peer() -> peer.Peer:
    """Who made this thread's connection."""
    sockaddr, length = ctypes.create_string_buffer(SOCKADDR_BYTES), ctypes.c_uint32(SOCKADDR_BYTES)
    _nbdkit.nbdkit_peer_name(sockaddr, ctypes.byref(length))
    if int.from_bytes(sockaddr.raw[:2], sys.byteorder) == socket.AF_UNIX:
        return peer.of_process(_nbdkit.nbdkit_peer_pid())
    return peer.of_address(sockaddr.raw)


def export_description(h: Handle) -> str:
    """A word about it for clients that list exports."""
    return _describe(_served[h.name].config)


def get_size(h: Handle) -> int:
    """The device's size, in bytes."""
    return h.size


def block_size(h: Handle) -> tuple[int, int, int]:  # noqa: ARG001
    """Pages are best, anything goes, and a maximum keeps nbdkit's buffers small."""
    return 1, _core.PAGE, MAX_REQUEST


def is_rotational(h: Handle) -> bool:  # noqa: ARG001
    """Never: Linux only trims swap areas on devices that say so."""
    return False


def _yes(h: Handle) -> bool:  # noqa: ARG001
    return True


def can_write(h: Handle) -> bool:
    """Whether it is more than a source to read."""
    return not _served[h.name].config.is_read_only


can_flush = can_trim = can_zero = _yes


def can_fast_zero(h: Handle) -> bool:
    """Where zeroing is a change of the index, and not of the file as well."""
    config = _served[h.name].config
    return not config.durable and config.source is None


can_multi_conn = _yes  # all connections see the same pages, and a flush on one covers all
can_extents = _yes  # the index knows what is zeros


def can_fua(h: Handle) -> int:  # noqa: ARG001
    """As flush: the page path knows what it means."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(h: Handle) -> int:  # noqa: ARG001
    """Caching brings pages from the file into tmem."""
    return int(nbdkit.CACHE_NATIVE)
