"""The messages between tmemd and its clients.

One request and one answer for each connection, each a JSON object on one line, over a unix stream socket. The answer to
Attach carries the open pool file with it (SCM_RIGHTS). Everything that comes from outside is checked here, by type and
by bound, before anything acts on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec

from tmemd.poolfile import NAME_PATTERN, NAME_RULE, Counters, PoolError, is_name

DEFAULT_SOCKET: Final = Path("/run/tmemd/tmemd.sock")
DEFAULT_POOLS: Final = Path("/run/tmemd/pools")
MAX_REQUEST: Final = 4096
MAX_ANSWER: Final = 16 << 20
TIMEOUT: Final = 10.0  # seconds, for a whole exchange

Name: TypeAlias = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Bytes: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
Work: TypeAlias = Literal["drain", "demote", "settle"]


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
    """All pools the caller may see."""


class Show(_Message, frozen=True):
    """One pool."""

    name: Name


class Target(_Message, frozen=True):
    """Set a pool's target, in bytes."""

    name: Name
    target: Bytes


class Freeze(_Message, frozen=True):
    """Let a pool refuse all puts, or accept them again."""

    name: Name
    frozen: bool


class Ask(_Message, frozen=True):
    """Ask the plugin that serves a pool for background work; *nbytes* is for demote."""

    name: Name
    work: Work
    nbytes: Bytes = 0


class Destroy(_Message, frozen=True):
    """Remove a pool nobody serves; with pages in tmem only where *lose_pages* says so."""

    name: Name
    lose_pages: bool = False


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
    error: str | None  # why the pool cannot be used; all numbers are 0 then
    counters: Counters

    def flat(self) -> dict[str, Any]:
        """One flat JSON object, as tmemctl prints it."""
        own = {field: getattr(self, field) for field in self.__struct_fields__ if field != "counters"}
        own["pid"] = self.counters.pid if self.served else None
        return own | {key: value for key, value in msgspec.structs.asdict(self.counters).items() if key not in own}


class Attached(_Message, frozen=True):
    """The open pool file comes with this message; *path* is where it lies."""

    path: str


class Listed(_Message, frozen=True):
    """Answer to List (all) and Show (one)."""

    pools: list[PoolStatus]


class Asked(_Message, frozen=True):
    """The work is done when the pool's done_request reaches *number*."""

    number: int


class Done(_Message, frozen=True):
    """It was done."""


class Failed(_Message, frozen=True):
    """It was not done, and nothing changed."""

    error: str


Request: TypeAlias = Attach | List | Show | Target | Freeze | Ask | Destroy
Answer: TypeAlias = Attached | Listed | Asked | Done | Failed

_requests: Final = msgspec.json.Decoder(Request)
_answers: Final = msgspec.json.Decoder(Answer)


def encode(message: Request | Answer) -> bytes:
    """The message as one line."""
    return msgspec.json.encode(message) + b"\n"


def decode_request(line: bytes) -> Request:
    """Read a request. Raises ProtocolError."""
    try:
        return _requests.decode(line)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"bad request: {error}") from None


def decode_answer(line: bytes) -> Answer:
    """Read an answer. Raises ProtocolError."""
    try:
        return _answers.decode(line)  # type: ignore[no-any-return]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"bad answer from tmemd: {error}") from None


def check_name(name: str) -> str:
    """The name itself, if it is one. Raises PoolError."""
    if not is_name(name):
        raise PoolError(f"{name!r} is no pool name: {NAME_RULE}")
    return name
