# SPDX-License-Identifier: BSD-3-Clause
"""The definition of a device, /etc/tmemd/NAME.conf: what its unit reads, and people may write.

Its syntax is that of systemd's EnvironmentFile=. Lines that are not known here stay as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tmemd.definitions.place import Place
from tmemd.device.config import INSIDE, Uri, parse_place
from tmemd.sizes import parse_size
from tmemd.store.poolfile import PoolError
from tmemd.suggestions import suggestion

NAME_RULE: Final = "a device's name is 1 to 25 lower-case letters, digits, '_' and '-', the first a letter or digit"
NO_BACKING: Final = "none"
BACKING: Final = "backing"  # the name of a backing file
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,24}")
_OPTION: Final = re.compile(r"([a-z]+)=([\w./:,+@%=-]+)", re.ASCII)  # what /bin/sh leaves as it is
_OWN_KEYS: Final = {"name", "size", "backing", "source", "tmemd", "pools"}  # which the unit says
_UNFINISHED: Final = "# Unfinished: 'tmemctl remove' takes away what there is of it.\n"
_LINE: Final = re.compile(r"^[ \t]*(\w+)[ \t]*=[ \t]*(.*?)[ \t]*$", re.MULTILINE)
_PIECE: Final = re.compile(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_PLAIN: Final = re.compile(r"[\w./:=,+@%-]*", re.ASCII)


def check_name(name: str) -> str:
    """The name itself, if a device can have it. Raises PoolError."""
    if not _NAME.fullmatch(name):
        raise PoolError(f"{name!r} is no name for a device: {NAME_RULE}")
    return name


def check_option(option: str) -> str:
    """A KEY=VALUE for the plugin, if it can stand in a definition. Raises PoolError."""
    found = _OPTION.fullmatch(option)
    if not found:
        raise PoolError(f"{option!r} is no KEY=VALUE of letters, digits and ./:,+@%=_- (man nbdkit-tmem-plugin)")
    if found[1] in _OWN_KEYS:
        raise PoolError(f"{option}: {found[1]}= is not for further options")
    return option


@dataclass(frozen=True)
class Definition:
    """What a device is to be. `size` is text, as people write it; '' with a source."""

    name: str
    size: str = ""
    backing: str = ""  # a path, or 'none'; '' with a source
    source: str = ""
    options: tuple[str, ...] = ()
    source_owner: str = ""  # the number of the user whose a source was that is the device's user's now
    is_unfinished: bool = False  # it is being made or taken away, or that was not brought to its end
    text: str = ""  # what it was read from

    @property
    def size_bytes(self) -> int | None:
        """Its size, where that is not its source's. Raises PoolError."""
        try:
            return parse_size(self.size) if self.size else None
        except ValueError as error:
            raise PoolError(f"{self.name}: SIZE={error}") from None

    @property
    def backing_path(self) -> Path | None:
        """Its backing file or block device, where that is of this host."""
        return None if self.backing == NO_BACKING else _path(self.backing)

    @property
    def own_directory(self) -> Path | None:
        """Where its backing file is, if that directory was made for it, elsewhere than with the others'."""
        path = self.backing_path
        return path.parent if path and path.name == BACKING and path.parent.name == self.name else None

    @property
    def source_path(self) -> Path | None:
        """Its source, where that is of this host."""
        return _path(self.source)

    @property
    def server(self) -> Uri | None:
        """The NBD server that has its pages, or is its source."""
        place = parse_place(self.backing or self.source)
        return place if isinstance(place, Uri) else None

    @property
    def bitmap_path(self) -> Path | None:
        """Its write-intent bitmap, if that is a file of its own."""
        given = self.option("bitmap") or self.option("map")
        if self.has_tail:
            return None
        return Path(given) if given else self.backing_path and Path(f"{self.backing_path}.map")

    @property
    def has_tail(self) -> bool:
        """Whether the end of its backing says what it is, by name and size, for other hosts to take it over."""
        is_disk = self.server is not None or (self.backing_path is not None and self.backing_path.is_block_device())
        given = self.option("bitmap") or self.option("map")
        return given == INSIDE or (bool(self.backing) and is_disk and given is None)

    @property
    def is_written_through(self) -> bool:
        """Whether it writes to its source."""
        return bool(self.source) and self.option("write") == "through"

    @property
    def vhost(self) -> Path | None:
        """The socket of its virtio door."""
        given = self.option("vhost")
        return Path(given) if given else None

    def option(self, key: str) -> str | None:
        """The value of one of its further options."""
        return next((each.partition("=")[2] for each in self.options if each.startswith(f"{key}=")), None)

    def keys(self) -> list[str]:
        """The plugin's parameters that say what it is, as its unit makes them."""
        kind = [f"source={self.source}"] if self.source else [f"size={self.size}", f"backing={self.backing}"]
        return [f"name={self.name}", *kind]

    def render(self) -> str:
        """The definition as a file."""
        values = {"SIZE": self.size, "BACKING": self.backing, "SOURCE": self.source, "OPTIONS": " ".join(self.options)}
        values["SOURCE_OWNER"] = self.source_owner
        text = self.text.replace(_UNFINISHED, "")
        for key, value in values.items():
            text = _with_value(text, key, value)
        return (_UNFINISHED if self.is_unfinished else "") + text


def _path(text: str) -> Path | None:
    place = parse_place(text) if text else None
    return place if isinstance(place, Path) else None


def parse(name: str, text: str, place: Place) -> Definition:
    """Read a definition."""
    found = {key: _unquoted(value) for key, value in _LINE.findall(text.replace("\\\n", ""))}
    source, backing = found.get("SOURCE", ""), found.get("BACKING", "")
    return Definition(
        name,
        "" if source else found.get("SIZE", ""),
        "" if source else backing or str(place.home(name) / BACKING),
        source,
        tuple(found.get("OPTIONS", "").split()),
        found.get("SOURCE_OWNER", ""),
        text.startswith(_UNFINISHED),
        text,
    )


def load(place: Place, name: str) -> Definition:
    """The definition of a device. Raises PoolError where there is none."""
    path = place.definition(check_name(name))
    try:
        return parse(name, path.read_text(), place)
    except FileNotFoundError:
        meant = suggestion(name, [each.stem for each in place.definitions.glob("*.conf")])
        raise PoolError(f"no device {name} is defined{meant or f' ({path})'}") from None
    except UnicodeDecodeError:
        raise PoolError(f"{path} is no text") from None


def load_all(place: Place) -> Iterator[Definition]:
    """All definitions, by name; what is no device's is left out."""
    for path in sorted(place.definitions.glob("*.conf")):
        if _NAME.fullmatch(path.stem) and ((found := load(place, path.stem)).size or found.source):
            yield found


def save(place: Place, definition: Definition) -> Definition:
    """Write it down: whenever the host dies, it is there as before or as it is to be. Returns it as it was written."""
    path = place.definition(definition.name)
    written = replace(definition, text=definition.render())
    new = path.with_name(f".{path.name}.new")
    with open(new, "w") as file:
        file.write(written.text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)
    return written


def sync_directory(path: Path) -> None:
    """Make names in a directory survive the host."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _unquoted(value: str) -> str:
    pieces = _PIECE.findall(value)
    return "".join(single or re.sub(r"\\([\"\\$`])", r"\1", double) or escaped or bare
                   for single, double, escaped, bare in pieces)  # fmt: skip


def _quoted(value: str) -> str:
    if _PLAIN.fullmatch(value):
        return value
    return '"' + re.sub(r'(["\\$`])', r"\\\1", value) + '"'


def _with_value(text: str, key: str, value: str) -> str:
    """The text with a key's line as it is to be: in its place, or at the end; none where the value is empty."""
    line = f"{key}={_quoted(value)}\n" if value else ""
    old = re.compile(rf"^[ \t]*{key}[ \t]*=(?:.*\\\n)*.*\n?", re.MULTILINE)
    if old.search(text):
        return old.sub(lambda _: line, text, count=1)
    return text + ("\n" if line and text and not text.endswith("\n") else "") + line
