# SPDX-License-Identifier: BSD-3-Clause
"""tmemd: creates pools for the plugins it trusts, sets their targets, and answers tmemctl.

No page of any device passes through it, and plugins need it only to start: it may die and come back at any time. Here
its arguments are read, its parts are put together, and signals end it.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import Final

from tmemd import protocol, version
from tmemd.daemon import checkconfig
from tmemd.daemon.access import Flags, gid_of, grants, uid_of
from tmemd.daemon.administration import Administration
from tmemd.daemon.directory import prepare_directory
from tmemd.daemon.maintenance import Maintenance
from tmemd.daemon.sdnotify import notify
from tmemd.daemon.server import Server, give_socket, listen
from tmemd.daemonconfig import DEFAULT_PATH as DEFAULT_CONFIG
from tmemd.daemonconfig import (
    DEFAULT_TMPFS,
    Account,
    Address,
    ConfigFileError,
    DaemonConfig,
    load_config,
    read_config,
)
from tmemd.governor.governor import Governor
from tmemd.governor.host import total_memory
from tmemd.settings import DEFAULT_STATE, SettingsStore
from tmemd.sizes import size_argument
from tmemd.store.directory import Pools
from tmemd.store.poolfile import PoolError

_log: Final = logging.getLogger("tmemd")


async def run(
    server: Server, maintenance: Maintenance, listener: socket.socket, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve and look after the pools until cancelled; *ready* is called when both have begun."""
    async with asyncio.TaskGroup() as group:
        group.create_task(server.run(listener))
        await maintenance.start(group)
        ready()


async def _run_until_told(server: Server, maintenance: Maintenance, listener: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def ready() -> None:
        _log.info("listening on %s", listener.getsockname())
        notify("READY=1")

    running = loop.create_task(run(server, maintenance, listener, ready))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    loop.add_signal_handler(signal.SIGHUP, maintenance.reload)
    with suppress(asyncio.CancelledError):
        await running
    notify("STOPPING=1")


def _start(arguments: argparse.Namespace) -> int:
    total = total_memory()
    if arguments.check_config:
        return _check(arguments, total)
    config, problem = _usable_config(arguments.config, total)
    prepare = partial(_prepare, arguments, config)
    if arguments.prepare:
        if problem:
            _log.error("%s", problem)
        prepare()
        return 0
    prepare()
    _serve(arguments, config, problem, prepare)
    return 0


def _check(arguments: argparse.Namespace, total: int) -> int:
    found = list(checkconfig.problems(
        arguments.config, total, flags=_flags(arguments), state=arguments.state, metrics=arguments.metrics
    ))  # fmt: skip
    for words in found:
        _log.error("%s", words)
    return 1 if found else 0


def _prepare(arguments: argparse.Namespace, config: DaemonConfig) -> None:
    """Make the directory fit for pools; with --mounted others mount its tmpfs. Raises PoolError."""
    size = arguments.tmpfs_size
    if size is None and not arguments.mounted:
        configured = config.tmpfs.size
        size = str(configured.of(total_memory())) if configured else DEFAULT_TMPFS if arguments.prepare else None
    prepare_directory(arguments.pools, size, mounted=arguments.mounted)


def _flags(arguments: argparse.Namespace) -> Flags:
    return Flags(arguments.group, tuple(arguments.allow_user), tuple(arguments.allow_group))


def _serve(
    arguments: argparse.Namespace, config: DaemonConfig, problem: str | None, prepare: Callable[[], None]
) -> None:
    """Until told to end. *problem*: what is wrong with the configuration."""
    granted = grants(_flags(arguments), config.access)
    with ExitStack() as resources:
        listener = listen(arguments.socket, granted.group, resources)
        pools = Pools(arguments.pools.resolve(), keep=True)
        resources.callback(pools.close)
        store = resources.enter_context(closing(SettingsStore(arguments.state)))
        administration = Administration(pools, store, config, total_memory())
        administration.problems.note("configuration", problem)
        administration.name_owners()
        administration.adopt()
        governor = Governor(pools, administration.granted, config)
        server = Server(administration, governor, granted.access, arguments.timeout)

        def configured(now: DaemonConfig) -> None:
            found = grants(_flags(arguments), now.access)
            server.access = found.access
            give_socket(arguments.socket, found.group)
            administration.problems.note("access", "; ".join(found.wrong) or None)

        configured(config)
        maintenance = Maintenance(
            administration, governor, config=arguments.config, metrics=arguments.metrics, prepare=prepare,
            configured=configured,
        )  # fmt: skip
        asyncio.run(_run_until_told(server, maintenance, listener))


def _usable_config(path: Path | None, total: int) -> tuple[DaemonConfig, str | None]:
    """The configuration as far as it can be used, and what is wrong with it: guests need their devices all the same.

    The defaults stand in for a file that cannot be read: their reserve and maximum protect the host.
    """
    try:
        return read_config(path, total), None
    except ConfigFileError as error:
        problem = str(error)
    try:
        return load_config(path or DEFAULT_CONFIG), f"{problem}; it holds as far as it can be kept to"
    except ConfigFileError:
        return DaemonConfig(), f"{problem}; the defaults hold until it is mended"


def _account(find: Callable[[Account], int]) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return find(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


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
    parser = argparse.ArgumentParser(
        prog="tmemd", description="Give swap devices their share of this host's RAM.",
        epilog="What stands in brackets is the key of tmemd.toml that an option goes before.",
    )  # fmt: skip
    add = parser.add_argument
    add("--socket", type=Path, default=protocol.DEFAULT_SOCKET, metavar="PATH", help="where to listen (%(default)s)")
    add("--pools", type=Path, default=protocol.DEFAULT_POOLS, metavar="DIR", help="where pools are (%(default)s)")
    add("--tmpfs-size", type=_tmpfs_size, metavar="SIZE",
        help="mount a tmpfs of this size, or of N%% of RAM, on DIR (tmpfs.size)")  # fmt: skip
    add("--mounted", action="store_true", help="refuse DIR while nothing is mounted on it")
    add("--group", type=_account(gid_of), help="who may connect, besides tmemd's own user (access.group)")
    add("--allow-user", type=_account(uid_of), action="append", default=[], metavar="USER",
        help="whose plugins to trust, besides root's and ours; again for more (access.allow_users)")  # fmt: skip
    add("--allow-group", type=_account(gid_of), action="append", default=[], metavar="GROUP",
        help="trust all plugins in this group, whoever's they are; again for more (access.allow_groups)")  # fmt: skip
    add(
        "--prepare",
        action="store_true",
        help="only make DIR ready for pools, mount its tmpfs (of 50%% of RAM, if not configured), and end",
    )
    add("--config", type=Path, metavar="FILE", help=f"configuration ({DEFAULT_CONFIG}, if it is there)")
    add("--check-config", action="store_true", help="only say what is wrong with the configuration, if anything is")
    add("--state", type=Path, default=DEFAULT_STATE, metavar="FILE", help="where to keep settings (%(default)s)")
    add("--metrics", type=_address, metavar="HOST:PORT", help="where to serve Prometheus (nowhere, if not configured)")
    add("--timeout", type=float, default=protocol.TIMEOUT, metavar="SECONDS", help=argparse.SUPPRESS)
    add("-v", "--verbose", action="store_true", help="log more: why each target changed, and connections that broke")
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
        return _start(arguments)
    except PoolError as error:
        _log.error("%s", error)
        return 1
    except OSError as error:
        _log.error("%s: %s", error.filename or arguments.socket, error.strerror or error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
