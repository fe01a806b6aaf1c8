"""tmemd: creates pools for the plugins it trusts, sets their targets, and answers tmemctl.

No page of any device passes through it, and plugins need it only to start: it may die and come back at any time.
"""

from __future__ import annotations

import argparse
import asyncio
import grp
import logging
import os
import pwd
import resource
import signal
import socket
import stat
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from tmemd import protocol, version
from tmemd.daemon import metricserver
from tmemd.daemon.administration import Administration
from tmemd.daemon.metrics import Snapshot, TickTimes
from tmemd.daemon.metricserver import MetricsServer
from tmemd.daemon.sdnotify import notify
from tmemd.daemonconfig import DEFAULT_PATH as DEFAULT_CONFIG
from tmemd.daemonconfig import Address, ConfigFileError, DaemonConfig, load_config
from tmemd.governor.governor import TICK, Governor
from tmemd.governor.host import read_memory
from tmemd.settings import DEFAULT_STATE, SettingsStore
from tmemd.sizes import format_size, size_argument
from tmemd.store.pool import Pools, open_pool_file
from tmemd.store.poolfile import PoolError
from tmemd.system import tmpfs
from tmemd.system.locks import open_lock_file

_log: Final = logging.getLogger("tmemd")
_T = TypeVar("_T")
_UCRED: Final = struct.Struct("iII")
# Enough for any use; a user who wants more gets an error instead of all of tmemd's descriptors.
_CONNECTIONS_PER_USER: Final = 64
_TOO_MANY: Final = protocol.Failed("too many connections of yours are open")
_BACKLOG: Final = 128
_NEARLY: Final = 0.99  # the kernel's 50 % of RAM are a few pages less than ours
_SCAN_INTERVAL: Final = 5.0  # seconds between two looks at the directory


@dataclass(frozen=True)
class Peer:
    """Who is at the other end, as the kernel says."""

    pid: int
    uid: int
    gid: int

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Ask the kernel, which noted it when the peer connected."""
        return cls(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))


@dataclass(frozen=True)
class Access:
    """Who may do what. Administrators (root and tmemd's own user) may do everything."""

    plugin_users: frozenset[int]  # who may attach a plugin
    plugin_groups: frozenset[int] = frozenset()  # or in which groups plugins may run that do

    def is_admin(self, uid: int) -> bool:
        """Whether *uid* may change other users' pools."""
        return uid in {0, os.geteuid()}

    def check(self, request: protocol.Request, peer: Peer) -> None:
        """Raise PoolError if *peer* may not ask for this; reading is let through and filtered by `may_see`."""
        match request:
            case protocol.Attach():
                trusted = peer.uid in self.plugin_users or peer.gid in self.plugin_groups
                if not trusted and not self.is_admin(peer.uid):
                    raise PoolError(
                        f"user {peer.uid} in group {peer.gid} may not attach:"
                        f" start tmemd with --allow-user={peer.uid}, or the plugin in a group of --allow-group"
                    )
            case protocol.List() | protocol.Show() | protocol.Host():
                pass
            case _:
                if not self.is_admin(peer.uid):
                    raise PoolError("only root and tmemd's own user may change pools")

    def may_see(self, status: protocol.PoolStatus, uid: int) -> bool:
        """Whether *uid* may know of this pool."""
        return self.is_admin(uid) or status.uid == uid


class Daemon:
    """What tmemd knows while it runs: the pools it keeps, who may ask, and who is asking."""

    def __init__(
        self,
        administration: Administration,
        governor: Governor,
        access: Access,
        *,
        timeout: float,
        config: Path | None = None,
        metrics: Address | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        """*config* is read again when it is asked for; *metrics* goes before what is configured.

        *prepare* makes the pools' directory a place for pools again when it is none any more, or raises PoolError.
        """
        self._prepare = prepare
        self._config = config
        self._metrics = metrics
        self._problems = administration.problems
        self._look_now = asyncio.Event()
        self._reload = False
        self._publishing: tuple[Address, asyncio.Task[None]] | None = None
        self._administration = administration
        self._governor = governor
        self._access = access
        self._timeout = timeout
        self._connections: Counter[int] = Counter()
        # A list of 256 pools takes 16 ms. With 60 connections that asked for it again and again, others waited for 0.6
        # to 1.1 s; 0.03 s where each user has one in a turn of the loop, and who connects need not wait for a turn.
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticks = TickTimes()
        self._unusable: set[str] = set()

    async def run(self, listener: socket.socket, ready: Callable[[], None] = lambda: None) -> None:
        """Serve everybody who connects and look after the pools, until cancelled; *ready* is called when it is so."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._accept(listener))
            await self._look(group)
            ready()
            group.create_task(self._look_after(group))
            group.create_task(self._mend_settings())
            group.create_task(self._govern())

    async def _look_after(self, group: asyncio.TaskGroup) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), _SCAN_INTERVAL)
            self._look_now.clear()
            try:
                await self._look(group)
            except Exception as error:
                _log.exception("pools are not looked after: %s", error)

    async def _look(self, group: asyncio.TaskGroup) -> None:
        """Find pools that others made or removed, and try again what did not go well.

        The memory of a removed pool is only free once we let go of it.
        """
        self._read_configuration()
        self._find_home()
        self._adopt()
        await self._publish(group)

    async def _mend_settings(self) -> None:
        """By itself, for the disk that they are on may hang."""
        while True:
            await asyncio.sleep(_SCAN_INTERVAL)
            if self._problems.of("settings"):
                async with self._administration.changing:
                    await self._administration.retry()
                self._adopt()

    def _find_home(self) -> None:
        """Pools that were made below an unmounted tmpfs would lie on a disk, and vanish when it is mounted again."""
        pools = self._administration.pools
        try:
            pools.check_home()
        except PoolError as error:
            try:
                self._prepare()
                pools.move_in()
            except PoolError as reason:
                words = (
                    f"{error}, and cannot be had again ({reason}): no device attaches until it is mounted; trying again"
                )
                self._problems.note("pools", words)
                return
            _log.warning("%s; it was mounted again, and pools begin anew: restart the devices that are served", error)
        self._problems.note("pools", None)

    def _read_configuration(self) -> None:
        """Where it was asked for, and after that until it can be used."""
        wanted, self._reload = self._reload, False
        if not wanted and self._problems.of("configuration") is None:
            return
        try:
            config = read_config(self._config)
        except PoolError as error:
            if wanted or not str(self._problems.of("configuration")).startswith(str(error)):
                self._problems.note("configuration", f"{error}; the configuration stays as it was")
            return
        self._administration.configure(config)
        self._governor.configure(config)
        self._problems.note("configuration", None)
        self._adopt()
        _log.info("configuration read again")
        with suppress(PoolError):
            tell_of_small_tmpfs(self._administration.pools, config)

    async def _publish(self, group: asyncio.TaskGroup) -> None:
        """Serve metrics where they are wanted now, as soon as there is such an address."""
        wanted = self._metrics or self._administration.config.metrics.listen
        address, task = self._publishing or (None, None)
        if wanted != address and task:
            task.cancel()
            self._publishing = None
            await asyncio.wait([task])
        if wanted and self._publishing is None:
            try:
                listener = await asyncio.to_thread(metricserver.listen, wanted)
            except PoolError as error:
                self._problems.note("metrics", f"{error}; trying again")
                return
            self._publishing = wanted, group.create_task(MetricsServer(listener, self.snapshot).run())
        self._problems.note("metrics", None)

    def _adopt(self) -> None:
        try:
            failed = self._administration.adopt()
        except PoolError as error:
            _log.warning("%s", error)
            return
        for name in sorted(failed - self._unusable):
            _log.warning("pool %s cannot be used", name)
        self._unusable = failed

    async def _govern(self) -> None:
        """Set targets tick by tick. Whatever goes wrong in one, devices go on with the targets they have."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                with self._ticks.time():
                    self._governor.tick()
            except Exception as error:
                words = f"targets stay as they are: {error}"
                if self._problems.of("targets") != words and not isinstance(error, PoolError | OSError):
                    _log.exception("a mistake of ours")
                self._problems.note("targets", words)
            else:
                self._problems.note("targets", None)
            await asyncio.sleep(began + TICK - loop.time())

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            for number in count():
                try:
                    sock, _ = await loop.sock_accept(listener)
                except OSError as error:  # out of descriptors, or the peer is gone already
                    _log.warning("accept: %s", error.strerror)
                    await asyncio.sleep(0.1)
                    continue
                task = loop.create_task(self._serve(sock))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                # With more of them waiting, accepting would go on and on before anybody else has a turn.
                if number % _BACKLOG == 0:
                    await asyncio.sleep(0)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, sock: socket.socket) -> None:
        peer = Peer.of(sock)
        self._connections[peer.uid] += 1
        try:
            if self._connections[peer.uid] > _CONNECTIONS_PER_USER:
                await self._patiently(_send(sock, protocol.encode(_TOO_MANY)))
            else:
                await self._exchange(sock, peer)
        except TimeoutError:
            _say(sock, protocol.Failed(f"the request took longer than {self._timeout:g} s to arrive"))
        except OSError as error:
            _log.debug("process %d: %s", peer.pid, error)
        finally:
            self._connections[peer.uid] -= 1
            sock.close()

    async def _patiently(self, exchange: Awaitable[_T]) -> _T:
        async with asyncio.timeout(self._timeout):
            return await exchange

    async def _exchange(self, sock: socket.socket, peer: Peer) -> None:
        try:
            line = await self._patiently(_receive_line(sock))
        except PoolError as error:
            data = protocol.encode(protocol.Failed(str(error)))
        else:
            data = b"" if line is None else await self._answer(sock, peer, line)
        if data:
            await self._patiently(_send(sock, data))

    async def _answer(self, sock: socket.socket, peer: Peer, line: bytes) -> bytes:
        """What is left to be sent; an Attach is answered with its file already."""
        try:
            request = protocol.decode_request(line)
            self._access.check(request, peer)
            if isinstance(request, protocol.Attach):
                async with self._administration.changing:
                    self._attach(sock, peer, request)
                return b""
            return protocol.encode(await self._perform(request, peer.uid))
        except PoolError as error:
            return protocol.encode(protocol.Failed(str(error)))
        except OSError as error:  # a full tmpfs, above all
            _log.warning("process %d, user %d: %s: %s", peer.pid, peer.uid, ascii(line), error.strerror)
            return protocol.encode(protocol.Failed(f"tmemd could not do it: {error.strerror}"))
        except Exception:
            _log.exception("process %d, user %d: %s", peer.pid, peer.uid, ascii(line))
            return protocol.encode(protocol.Failed("tmemd met an error: its log tells more"))

    async def _perform(self, request: protocol.Request, uid: int) -> protocol.Answer:
        if isinstance(request, protocol.Host):
            return msgspec.structs.replace(self._governor.status, problems=self._problems.all())
        if isinstance(request, protocol.List | protocol.Show):
            async with self._turns[uid]:
                await asyncio.sleep(0)  # everybody else's
                answer = await self._administration.perform(request)
        else:
            answer = await self._administration.perform(request)
        if not isinstance(answer, protocol.Listed):
            _log.info("user %d %s", uid, protocol.in_words(request))
            return answer
        seen = [status for status in answer.pools if self._access.may_see(status, uid)]
        if isinstance(request, protocol.Show) and not seen:
            raise PoolError(f"pool {request.name} belongs to another user")
        return protocol.Listed(seen, self._problems.all())

    def _attach(self, sock: socket.socket, peer: Peer, request: protocol.Attach) -> None:
        bounded = not self._access.is_admin(peer.uid)
        governor = self._governor
        with self._administration.attach(
            request, peer.uid, peer.gid, bounded=bounded, allow=governor.first_target, admit=governor.admit
        ) as found:
            # The plugin gets an open file description of its own: locks belong to it, and ours must end with us.
            fd = open_pool_file(found.path)
            try:
                socket.send_fds(sock, [protocol.encode(protocol.Attached(str(found.path)))], [fd])
            finally:
                os.close(fd)
        _log.info("user %d, process %d, attached pool %s", peer.uid, peer.pid, request.name)

    async def snapshot(self) -> Snapshot:
        """What Prometheus is told. Everybody else has a turn after each pool. Raises PoolError."""
        pools = []
        for name in self._administration.pools.names():
            with suppress(PoolError):
                if status := self._administration.status(name):
                    pools.append(status)
            await asyncio.sleep(0)
        return Snapshot(pools, self._host(), self._ticks, self._problems.all())

    def _host(self) -> protocol.HostStatus | None:
        with suppress(PoolError, OSError):
            return self._governor.status
        return None

    def reload(self) -> None:
        """Read the configuration again, soon; one that cannot be used is a problem, and the one before stays."""
        self._reload = True
        self._look_now.set()


def total_memory() -> int:
    """Bytes of RAM of this host, or of the smallest cgroup that tmemd runs in. Raises PoolError."""
    return min(memory.total for memory in read_memory())


def read_config(path: Path | None) -> DaemonConfig:
    """The configuration in that file; None: in the usual one, if there is one. Raises PoolError."""
    if path is None and not DEFAULT_CONFIG.exists():
        return DaemonConfig()
    path = path or DEFAULT_CONFIG
    config = load_config(path)
    try:
        config.check(total_memory())
    except ValueError as error:
        raise PoolError(f"{path}: {error}") from None
    return config


def usable_config(path: Path | None) -> tuple[DaemonConfig, str | None]:
    """The same as far as it can be used, and what is wrong with it: guests need their devices, whatever is in a file.

    One that cannot be read is taken for an empty one: what pools take is theirs until the host needs it, which the
    default reserve and maximum see to.
    """
    try:
        return read_config(path), None
    except PoolError as error:
        problem = str(error)
    try:
        return load_config(path or DEFAULT_CONFIG), f"{problem}; it holds as far as it can be kept to"
    except ConfigFileError:
        return DaemonConfig(), f"{problem}; the defaults hold until it is mended"


async def _receive_line(sock: socket.socket) -> bytes | None:
    """The one line a client sends; None when it hung up before its end. Raises PoolError when it is no such line."""
    loop = asyncio.get_running_loop()
    line = b""
    while b"\n" not in line:
        if len(line) > protocol.MAX_REQUEST:
            raise PoolError(f"bad request: longer than {protocol.MAX_REQUEST} bytes")
        data = await loop.sock_recv(sock, protocol.MAX_REQUEST)
        if not data:
            return None
        line += data
    if not line.endswith(b"\n") or line.count(b"\n") > 1:
        raise PoolError("bad request: a connection carries one request, on one line")
    return line


async def _send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


def _say(sock: socket.socket, answer: protocol.Answer) -> None:
    """Send what fits without waiting, to somebody who kept us waiting."""
    with suppress(OSError):
        sock.send(protocol.encode(answer))


def listen(path: Path, group: int | None, resources: ExitStack) -> socket.socket:
    """The control socket, which only its owner and *group* may connect to. Raises PoolError, OSError.

    *resources* gets what undoes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock says whether another tmemd lives; the socket's file alone cannot.
    try:
        resources.callback(os.close, open_lock_file(path.with_name(path.name + ".lock")))
    except BlockingIOError:
        raise PoolError(f"another tmemd listens on {path}: it holds {path}.lock") from None
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise PoolError(f"{path} is there already, and is no socket: say --socket=PATH")
        path.unlink()
    listener = resources.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
    # Between bind and chmod nobody can connect: connect() is refused until listen().
    listener.bind(str(path))
    resources.callback(path.unlink, missing_ok=True)
    if group is not None:
        os.chown(path, -1, group)
    path.chmod(0o660)
    listener.listen(_BACKLOG)
    return listener


def prepare_directory(path: Path, size: str | None, *, mounted: bool = False) -> None:
    """Make *path* a place for pools: on a tmpfs of its own when *size* is given. Raises PoolError.

    *mounted*: others mount it, and until they have it is refused, even on a tmpfs.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o711)
        if size is not None:
            _mount(path, size)
        if not tmpfs.is_tmpfs(path):
            raise PoolError(f"{path} is not on tmpfs: mount one there, or say --tmpfs-size")
        if mounted and not path.is_mount():
            raise PoolError(
                f"{path}: nothing is mounted there (--mounted); tmemd-pools.service does, where that is used"
            )
        _check_safe(path)
    except OSError as error:
        raise PoolError(f"{path}: {error.strerror or error}") from None


def _mount(path: Path, size: str) -> None:
    try:
        if not tmpfs.mount_tmpfs(path, size):
            _log.warning("%s: this kernel cannot keep a tmpfs out of swap (noswap, Linux 6.4)", path)
    except OSError as error:
        # One that is in use beyond the new size, say: without tmemd its pools would never become smaller.
        if not path.is_mount():
            raise
        _log.warning("%s stays as large as it is: %s", path, str(error).partition("\n")[0])


def tell_of_small_tmpfs(pools: Pools, config: DaemonConfig) -> None:
    """Log it where pools get less than the configuration allows, for their tmpfs holds no more. Raises PoolError."""
    maximum, capacity = config.budget.maximum.of(total_memory()), pools.capacity()
    if capacity < maximum * _NEARLY:
        _log.info(
            "pools get at most %s, which is what %s holds (--tmpfs-size), and not budget.maximum, %s",
            format_size(capacity), pools.directory, format_size(maximum),
        )  # fmt: skip


def _check_safe(path: Path) -> None:
    """Let nobody else lock the directory, and raise PoolError where others could put what they like among pools."""
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()}:
        raise PoolError(f"{path} belongs to user {status.st_uid}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PoolError(f"{path}: others may write to it: chmod go-w")
    # Who may read a directory can lock it.
    path.chmod(status.st_mode & ~(stat.S_IRGRP | stat.S_IROTH))


async def _run(daemon: Daemon, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def ready() -> None:
        _log.info("listening on %s", listener.getsockname())
        notify("READY=1")

    running = loop.create_task(daemon.run(listener, ready))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    with suppress(asyncio.CancelledError):
        await running
    notify("STOPPING=1")


def _start(arguments: argparse.Namespace) -> None:
    def prepare() -> None:
        prepare_directory(arguments.pools, arguments.tmpfs_size, mounted=arguments.mounted)

    if arguments.prepare:
        prepare()
        return
    if arguments.check_config:
        read_config(arguments.config)
        return
    config, problem = usable_config(arguments.config)
    with ExitStack() as resources:
        prepare()
        listener = listen(arguments.socket, arguments.group, resources)
        pools = Pools(arguments.pools.resolve(), keep=True)
        resources.callback(pools.close)
        store = resources.enter_context(closing(SettingsStore(arguments.state)))
        administration = Administration(pools, store, config, total_memory())
        administration.problems.note("configuration", problem)
        administration.name_owners()
        administration.adopt()
        tell_of_small_tmpfs(pools, config)
        governor = Governor(pools, administration.granted, config)
        daemon = Daemon(
            administration, governor, Access(frozenset(arguments.allow_user), frozenset(arguments.allow_group)),
            timeout=arguments.timeout, config=arguments.config, metrics=arguments.metrics, prepare=prepare,
        )  # fmt: skip
        asyncio.run(_run(daemon, listener))


def _uid(text: str) -> int:
    try:
        return int(text) if text.isascii() and text.isdigit() else pwd.getpwnam(text).pw_uid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no user {text!r}") from None


def _gid(text: str) -> int:
    try:
        return int(text) if text.isascii() and text.isdigit() else grp.getgrnam(text).gr_gid
    except KeyError:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}") from None


def _address(text: str) -> Address:
    try:
        return Address.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tmpfs_size(text: str) -> str:
    if text.endswith("%"):
        percent = text[:-1]
        if percent.isascii() and percent.isdigit() and 0 < int(percent) <= 100:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not 1% to 100%")
    size = size_argument(text)
    if not size:
        raise argparse.ArgumentTypeError("a size of 0 would let the tmpfs take all RAM")
    return str(size)


def build_parser() -> argparse.ArgumentParser:
    """The command line of tmemd."""
    parser = argparse.ArgumentParser(prog="tmemd", description="Give swap devices their share of this host's RAM.")
    add = parser.add_argument
    add("--socket", type=Path, default=protocol.DEFAULT_SOCKET, metavar="PATH", help="where to listen (%(default)s)")
    add("--pools", type=Path, default=protocol.DEFAULT_POOLS, metavar="DIR", help="where pools are (%(default)s)")
    add("--tmpfs-size", type=_tmpfs_size, metavar="SIZE", help="mount a tmpfs of this size, or of N%% of RAM, on DIR")
    add("--mounted", action="store_true", help="refuse DIR while nothing is mounted on it")
    add("--group", type=_gid, help="who may connect, besides tmemd's own user")
    add("--allow-user", type=_uid, action="append", default=[], metavar="USER",
        help="whose plugins to trust, besides root's and those of tmemd's own user; may be repeated")  # fmt: skip
    add("--allow-group", type=_gid, action="append", default=[], metavar="GROUP",
        help="trust every plugin that runs in this group, whoever's it is; may be repeated")  # fmt: skip
    add("--prepare", action="store_true", help="only make DIR ready for pools, mount its tmpfs, and end")
    add("--config", type=Path, metavar="FILE", help=f"configuration ({DEFAULT_CONFIG}, if it is there)")
    add("--check-config", action="store_true", help="only say what is wrong with the configuration, if anything is")
    add("--state", type=Path, default=DEFAULT_STATE, metavar="FILE", help="where to keep settings (%(default)s)")
    add("--metrics", type=_address, metavar="HOST:PORT", help="where to serve Prometheus (nowhere, if not configured)")
    add("--timeout", type=float, default=protocol.TIMEOUT, metavar="SECONDS", help=argparse.SUPPRESS)
    add("--verbose", action="store_true", help="log more")
    add("--version", action="version", version=f"tmemd {version()}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run tmemd until SIGTERM or SIGINT; returns its exit status."""
    arguments = build_parser().parse_args(argv)
    level = logging.DEBUG if arguments.verbose else logging.INFO
    logging.basicConfig(level=level, format="tmemd: %(message)s", stream=sys.stderr)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    try:
        _start(arguments)
    except PoolError as error:
        _log.error("%s", error)
        return 1
    except OSError as error:
        _log.error("%s: %s", error.filename or arguments.socket, error.strerror or error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
