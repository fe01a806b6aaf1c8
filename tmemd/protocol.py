# SPDX-License-Identifier: BSD-3-Clause
"""The messages between tmemd and its clients.

One request and one answer for each connection, each a JSON object on one line, over a unix stream socket. The answer to
Attach carries the open pool file with it (SCM_RIGHTS). Everything that comes from outside is checked here, by type and
by bound, before anything acts on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from tmemd.settings import MAX_WEIGHT, PoolSettings
from tmemd.sizes import format_size
from tmemd.store.poolfile import (
    GENERATIONS,
    NAME_PATTERN,
    Ages,
    Counters,
    Doors,
    Latencies,
    PoolError,
    PoolKind,
    RemoteState,
)

DEFAULT_SOCKET: Final = Path("/run/tmemd/tmemd.sock")
DEFAULT_POOLS: Final = Path("/run/tmemd/pools")
MAX_REQUEST: Final = 4096
MAX_ANSWER: Final = 16 << 20
TIMEOUT: Final = 10.0  # seconds, for a whole exchange
MAX_WAIT: Final = 5.0  # seconds, of an answer for something to happen

Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Weight: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHT)]
Configurable: TypeAlias = Literal["weight", "cap", "minimum", "compression"]
EventKind: TypeAlias = Literal[
    "appeared", "gone", "served", "unserved", "clients", "target", "refused", "problem", "mended",
]  # fmt: skip
PoolState: TypeAlias = Literal[
    "served", "idle", "unfinished", "half restored", "damaged", "starting", "stopped", "failed"
]
ServiceState: TypeAlias = Literal["running", "starting", "stopped", "failed", "unfinished"]
Work: TypeAlias = Literal[
    "drain", "demote", "compact", "flush", "handover", "handback", "settle"
]  # settle: what compact was called in 0.1


# 64 MiB put without a single trim: a guest that trims does so as soon as a process that was swapped out ends.
_PUTS_WITHOUT_TRIM: Final = 16384
_TAKEN_UNSAID: Final = 32 << 20  # bytes: what is allocated ahead, and counted a moment later


class ProtocolError(PoolError):
    """What came over the socket is no message."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag=str.lower):
    pass


class Attach(_Message, frozen=True):
    """A plugin wants the pool *name*, created if need be; *limit* is the device's own, in bytes."""

    name: Name
    size: Annotated[int, msgspec.Meta(ge=512, le=1 << 62)]
    has_file: bool
    limit: Bytes | None = None


class List(_Message, frozen=True):
    """All pools the caller may see; *long*: with latencies, ages and doors."""

    long: bool = False


class Show(_Message, frozen=True):
    """One pool; *long*: with latencies, ages and doors; *request*: with the answer to that one, by its number."""

    name: Name
    long: bool = False
    request: Annotated[int, msgspec.Meta(ge=0)] = 0


class Set(_Message, frozen=True, kw_only=True, omit_defaults=True):
    """Change settings of a pool, all or none; what is not named stays.

    None takes a cap away, or lets the policy find the target. For what is in *forget* the configuration file's setting
    holds again, or the default. *away*: also where there is no such pool now, for when it comes.
    """

    name: Name
    target: Bytes | msgspec.UnsetType | None = msgspec.UNSET
    weight: Weight | msgspec.UnsetType = msgspec.UNSET
    cap: Bytes | msgspec.UnsetType | None = msgspec.UNSET
    minimum: Bytes | msgspec.UnsetType = msgspec.UNSET
    compression: bool | msgspec.UnsetType = msgspec.UNSET
    forget: frozenset[Configurable] = frozenset()
    away: bool = False


class Freeze(_Message, frozen=True):
    """Let a pool (None: every one) refuse all puts, or accept them again."""

    name: Name | None
    frozen: bool


class Ask(_Message, frozen=True):
    """Ask the plugin that serves a pool for background work; *nbytes* is for demote."""

    name: Name
    work: Work
    nbytes: Bytes = 0
    min_age: Annotated[int, msgspec.Meta(ge=0, lt=GENERATIONS)] = 0  # generations; for demote
    raw_only: bool = False  # incompressible pages only; for demote


class Destroy(_Message, frozen=True, omit_defaults=True):
    """Remove a pool nobody serves; with pages in tmem only where *lose_pages* says so.

    What was set for it goes with it, but for *keep_settings*: one of that name comes again.
    """

    name: Name
    lose_pages: bool = False
    keep_settings: bool = False


class Rename(_Message, frozen=True):
    """What was set for a pool holds for one of another name from now on; neither is there now."""

    name: Name
    to: Name


class Host(_Message, frozen=True):
    """What the host can spare, and what the governor makes of it."""


class Events(_Message, frozen=True):
    """What happens to the pools the caller may see, after the event of that *number*; without one: from now on.

    Where nothing has happened yet the answer comes when something does, or after *wait* seconds.
    """

    number: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] | None = None
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)] = 0.0


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened. Sizes in bytes."""

    number: int = 0  # higher than that of all before, those of an earlier tmemd included
    time: float = 0.0  # seconds since the epoch
    event: EventKind
    pool: str | None = None
    uid: int | None = None  # whose pool it is
    pid: int | None = None  # of the plugin that came ('served'), or ended or was killed ('unserved')
    target_bytes: int | None = None
    before_bytes: int | None = None  # the target that was last told
    pages: int | None = None  # refused since that was last told
    connections: dict[str, int] | None = None  # by door, now
    what: str | None = None  # of a problem
    words: str | None = None


class Problem(msgspec.Struct, frozen=True):
    """Something that keeps tmemd from doing as it was told; it tries again until that is mended."""

    what: str  # a word: what it is about
    words: str  # what is wrong, and what to do


class HostStatus(_Message, frozen=True, kw_only=True, tag="hoststatus"):
    """Answer to Host. Sizes in bytes, shares from 0 to 1."""

    policy: str
    budget_bytes: int  # what all targets together may be
    targets_bytes: int
    used_bytes: int
    total_bytes: int  # of the host, or of the cgroup that tmemd runs in
    available_bytes: int
    reserve_bytes: int  # what is to stay available
    pressure_some: float | None  # share of the last tick in which some task waited for memory; None: not known here
    pressure_full: float | None  # and in which all did
    writes_left_bytes: int | None  # what demotion may write now; more comes in bit by bit; None: no bound
    problems: list[Problem] = []

    def flat(self) -> dict[str, Any]:
        """One JSON object, as tmemctl prints it, with the names that metrics have."""
        found: dict[str, Any] = msgspec.structs.asdict(self)
        found |= {new: found[old] for old, new in _HOST_NAMES.items()}
        return found | {"host_memory_pressure_ratio": {"some": self.pressure_some, "full": self.pressure_full}}


_HOST_NAMES: Final = {
    "total_bytes": "host_memory_total_bytes",
    "available_bytes": "host_memory_available_bytes",
    "reserve_bytes": "host_memory_reserve_bytes",
    "writes_left_bytes": "demotion_writes_left_bytes",
}


class PoolStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one pool; sizes in bytes."""

    name: str
    path: str
    uid: int  # whose pool it is
    size: int
    has_file: bool
    backing: str  # path of the backing file when a plugin last opened it; '' for none
    target_bytes: int  # what holds now: never above the device's limit
    frozen: bool
    served: bool
    error: str | None  # why the pool cannot be used; all numbers are 0 then, but for what it takes
    counters: Counters
    kind: PoolKind | None = None  # None: not known
    source: str = ""  # of an ephemeral pool, in place of a backing file
    taken_bytes: int = 0  # of RAM, by its file, as the kernel counts it
    unfinished: bool = False  # no plugin has made it a pool yet; numbers as with an error
    half_restored: bool = False  # a restore was begun, and has not ended
    settings: PoolSettings = PoolSettings()
    freeable_bytes: int = 0  # what demotion could give back
    latencies: Latencies | None = None  # only where asked for
    ages: Ages | None = None
    doors: Doors | None = None
    remote: RemoteState | None = None  # where its file, or source, is an NBD server's export
    miss_seconds: float | None = None  # a page takes to be read from the file or source; None: none was read
    durable: bool = False  # a write reaches the file before it is acknowledged
    handed_over: bool = False  # which it does because of a handover
    epoch: int | None = None  # how often the pool was made anew; None: not known
    service: ServiceState | None = None  # what that is of a device that is defined on this host; tmemd does not know
    answer: int | None = None  # errno of the request asked about, 0 for success; None: it is still to be done

    @property
    def state(self) -> PoolState:
        """In a word or two."""
        if self.half_restored and not self.served:
            return "half restored"
        if self.error:
            return "damaged"
        if self.service and not self.served:
            return "starting" if self.service == "running" else self.service
        return "unfinished" if self.unfinished else "served" if self.served else "idle"

    @property
    def connections(self) -> dict[str, int]:
        """Of clients, by the door they came in."""
        doors = self.doors if self.served else None
        return {"nbd": doors.nbd if doors else 0, "vhost": doors.vhost if doors else 0}

    @property
    def is_away(self) -> bool:
        """Whether its file is an NBD server's that cannot be reached."""
        return self.served and self.remote is not None and self.remote.is_away

    @property
    def overtakes(self) -> bool:
        """Whether its file takes much more RAM than the plugin that serves it says: its owner fills it by himself."""
        used = self.counters.used_bytes
        return self.error is None and self.taken_bytes > used + max(used // 8, _TAKEN_UNSAID)

    @property
    def never_trims(self) -> bool:
        """Whether the guest swaps and never says which pages are dead, so that they fill tmem.

        What is a disk, a durable device or a cache device, may never have anything to trim.
        """
        swaps = self.kind != "ephemeral" and not self.durable
        return swaps and self.counters.puts >= _PUTS_WITHOUT_TRIM and self.counters.trims == 0

    def flat(self) -> dict[str, Any]:
        """One flat JSON object, as tmemctl prints it, with the names that metrics have.

        Doors and what they did, latencies and ages are in it where latencies were asked for.
        """
        nested = {"counters", "settings", "latencies", "ages", "doors", "remote", "answer", "size"}
        own: dict[str, Any] = {field: getattr(self, field) for field in self.__struct_fields__ if field not in nested}
        own |= {"size_bytes": self.size, "state": self.state, "connections": self.connections}
        own["pid"] = self.counters.pid if self.served else None
        if self.latencies:
            own["latencies"] = msgspec.to_builtins(self.latencies)
            own["doors"] = msgspec.to_builtins(self.doors)
            own["remote"] = msgspec.to_builtins(self.remote)
        if self.ages:
            own["ages"] = _by_both_names(self.ages)
        settings = self.settings
        own |= {"weight": settings.weight, "cap_bytes": settings.cap, "minimum_bytes": settings.minimum}
        own |= {"pinned_target_bytes": settings.target, "compression_enabled": settings.compression}
        own |= {"never_trims": self.never_trims, "fenced": self.counters.is_fenced}
        own["lease_seconds"] = self.counters.lease_seconds
        own["least_bytes"] = self.counters.minimum_bytes
        own |= {key: value for key, value in msgspec.structs.asdict(self.counters).items() if key not in own}
        return own | {old: own[new] for old, new in OLD_NAMES.items()}


# What was called otherwise in 0.1; the old names go with the next release.
OLD_NAMES: Final = {
    "size": "size_bytes",
    "cap": "cap_bytes",
    "minimum": "minimum_bytes",
    "target": "pinned_target_bytes",
    "compression": "compression_enabled",
    "granules_set": "regions_set",
}


def _by_both_names(numbers: msgspec.Struct) -> dict[str, Any]:
    """Those that were renamed under their old names as well, which stay for who reads them."""
    return dict(msgspec.to_builtins(numbers)) | msgspec.structs.asdict(numbers)


class Attached(_Message, frozen=True):
    """The open pool file comes with this message; *path* is where it lies."""

    path: str


class Listed(_Message, frozen=True):
    """Answer to List (all) and Show (one)."""

    pools: list[PoolStatus]
    problems: list[Problem] = []  # of tmemd itself


class Happened(_Message, frozen=True):
    """Answer to Events."""

    events: list[Event]
    number: int  # to ask with the next time
    missed: bool = False  # whether there were others after the event asked about, which are forgotten


class Asked(_Message, frozen=True):
    """The work will be done; Show with this number as its *request* says when, and how it went. 0: it is done."""

    number: int


class Done(_Message, frozen=True):
    """It was done; *note*: and this should be known of it."""

    note: str | None = None


class Failed(_Message, frozen=True):
    """It was not done, and nothing changed; where all pools were meant, nothing for those that it names."""

    error: str


Request: TypeAlias = Attach | List | Show | Set | Freeze | Ask | Destroy | Rename | Host | Events
Answer: TypeAlias = Attached | Listed | Asked | Done | Failed | HostStatus | Happened

_requests: Final = msgspec.json.Decoder(Request)
_answers: Final = msgspec.json.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """The message as one line."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a request. Raises ProtocolError."""
    try:
        request: Request = _requests.decode(line)
        json.loads(line, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:  # msgspec's own and UnicodeDecodeError among them
        raise ProtocolError(f"bad request: {_in_one_line(str(error))}") from None
    return request


def _in_one_line(text: str) -> str:
    """With what cannot be printed escaped: msgspec repeats the names of fields it does not know as they came."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _distinct(members: list[tuple[str, object]]) -> None:
    """Raise ValueError where a key stands twice: decoders differ in which of them they believe."""
    keys = [key for key, _ in members]
    if len(set(keys)) < len(keys):
        raise ValueError("a key stands twice")


def decode_answer(line: bytes) -> Answer:
    """Read an answer. Raises ProtocolError."""
    try:
        return _answers.decode(line)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"bad answer from tmemd: {error}") from None


def in_words(request: Request) -> str:
    """What somebody did who made this request, for a log: 'set weight=300 cap=4.00G of pool web'."""
    match request:
        case Set(name=name):
            given = {field: getattr(request, field) for field in ("target", "weight", "cap", "minimum", "compression")}
            words = [f"{key}={_value(key, value)}" for key, value in given.items() if value is not msgspec.UNSET]
            words += [f"{field}=default" for field in sorted(request.forget)]
            return f"set {' '.join(words) or 'nothing'} of pool {name}"
        case Freeze(name, frozen):
            return f"{'froze' if frozen else 'thawed'} {'all pools' if name is None else f'pool {name}'}"
        case Ask(name, work):
            return f"asked pool {name} to {work}" + (f" {format_size(request.nbytes)}" if work == "demote" else "")
        case Destroy(name):
            return f"destroyed pool {name}"
        case Rename(name, to):
            return f"renamed pool {name} to {to}"
        case _:
            return f"asked for {type(request).__name__}"


def _value(field: str, value: object) -> str:
    if value is None:
        return "auto" if field == "target" else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return format_size(value) if isinstance(value, int) and field != "weight" else str(value)
