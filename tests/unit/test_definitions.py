# SPDX-License-Identifier: BSD-3-Clause
"""Definitions of devices as systemd and people write them, and what is told of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.harness import ROOT
from tmemd.definitions import attachment, definition, files, systemd
from tmemd.definitions.definition import Definition, check_name, check_option
from tmemd.definitions.place import Place
from tmemd.definitions.words import why
from tmemd.store.poolfile import PoolError

HOST = Place()
BY_HAND = """\
# A device of mine.
SIZE = 8G

; it is old
OPTIONS='lost=zero' "watermark=10%" \\
  flush=durable
"""


@pytest.mark.parametrize(
    ("text", "size", "backing", "source", "options"),
    [
        ("SIZE=8G\n", "8G", "/var/lib/tmemd-devices/web/backing", "", ()),
        ("SIZE=8G\nBACKING=none", "8G", "none", "", ()),
        ('SOURCE="/i m\\"g\\\\"\nSIZE=8G\n', "", "", '/i m"g\\', ()),
        ("SOURCE='/a $b'\nOPTIONS=limit=2G", "", "", "/a $b", ("limit=2G",)),
        (r"SOURCE=/a\ b", "", "", "/a b", ()),
        (BY_HAND, "8G", "/var/lib/tmemd-devices/web/backing", "", ("lost=zero", "watermark=10%", "flush=durable")),
        ("#SIZE=8G\n", "", "/var/lib/tmemd-devices/web/backing", "", ()),
    ],
)
def test_a_definition_says_what_systemd_would_read(
    text: str, size: str, backing: str, source: str, options: tuple[str, ...]
) -> None:
    found = definition.parse("web", text, HOST)
    assert (found.size, found.backing, found.source, found.options) == (size, backing, source, options)


@pytest.mark.parametrize(
    "path", ["/plain", "/a b", '/a"b', "/a'b", "/a\\b", "/a$b", "/a`b", "/a#b;", "nbd://host/x?y=z&w"]
)
def test_what_is_written_is_read_again(path: str) -> None:
    for made in (Definition("web", "8G", path, options=("a=b", "c=d%")), Definition("web", source=path)):
        found = definition.parse("web", made.render(), HOST)
        assert (found.size, found.backing, found.source, found.options) == (
            made.size, made.backing, made.source, made.options,
        )  # fmt: skip


def test_what_people_wrote_stays_when_it_is_written_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.definitions.mkdir(parents=True)
    place.definition("web").write_text(BY_HAND + "MORE=things\n")
    found = definition.load(place, "web")
    for is_unfinished in (True, False):
        found = definition.save(place, replace(found, size="16G", is_unfinished=is_unfinished))
        assert definition.load(place, "web").is_unfinished is is_unfinished
    text = place.definition("web").read_text()
    assert "# A device of mine.\nSIZE=16G\n\n; it is old\nOPTIONS=" in text
    assert "MORE=things\n" in text
    assert [path.name for path in place.definitions.iterdir()] == ["web.conf"]


@pytest.mark.parametrize("name", ["", "Web", "-web", "a/b", "..", "w" * 26, "wéb", "web\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(PoolError, match="is no name for a device"):
        check_name(name)


@pytest.mark.parametrize(
    "option", ["lost", "lost=", "=zero", "a=b c", "a=$(b)", "a=*", "a='b'", "name=x", "pools=/x", "SIZE=1"]
)
def test_options_that_are_none(option: str) -> None:
    with pytest.raises(PoolError):
        check_option(option)


def plan(place: Place, backing: str | None = None, source: str | None = None, *options: str) -> Definition:
    return files.plan(place, "web", size="8M", backing=backing, source=source, options=options)


def test_where_pages_go(tmp_path: Path) -> None:
    place = Place(tmp_path)
    home = place.home("web")
    assert plan(place).backing == f"{home}/backing"
    assert plan(place, "none").backing == "none"
    assert plan(place, str(tmp_path)).backing == f"{tmp_path}/web/backing"
    for elsewhere, bitmap in ((f"{tmp_path}/file", home / "map"), ("nbd://other/x", None)):
        found = plan(place, elsewhere)
        assert (found.backing, found.bitmap_path, found.has_tail) == (elsewhere, bitmap, bitmap is None)
    assert plan(place, f"{tmp_path}/file", None, "bitmap=inside").bitmap_path is None
    assert plan(place, f"{tmp_path}/file", None, "bitmap=/x").bitmap_path == Path("/x")


def test_what_its_unit_needs_besides(tmp_path: Path) -> None:
    place, file = Place(tmp_path), tmp_path / "file"
    file.touch()
    odd = tmp_path / 'o"d %d'
    odd.touch()
    (tmp_path / "web").mkdir()
    (tmp_path / "web/backing").touch()
    disk = next((path for path in Path("/dev").iterdir() if path.is_block_device()), None)
    lines: dict[tuple[Any, ...], str] = {
        (): "",
        (str(tmp_path),): f"ReadWritePaths={tmp_path}/web",
        (str(file),): f"ReadWritePaths={file}",
        (str(odd),): f'ReadWritePaths="{tmp_path}/o\\"d %%d"',
        ("none",): "",
        (None, str(file)): "",
        (None, str(file), "write=through"): f"ReadWritePaths={file}",
        ("nbd://other/x",): "PrivateNetwork=no\nRestrictAddressFamilies=AF_INET AF_INET6\nIPAddressDeny=",
        ("nbd+unix:///x?socket=/run/x",): "",
    }
    if disk:
        own = f"PrivateDevices=no\nDeviceAllow={disk} rw\nExecStartPre=+/bin/chown tmemd-web {disk}"
        lines |= {(str(disk),): own, (None, str(disk)): f"PrivateDevices=no\nDeviceAllow={disk} r"}
    for arguments, expected in lines.items():
        found = systemd.drop_in(plan(place, *arguments), place)
        assert found == (expected and f"# Written by tmemctl create.\n[Service]\n{expected}\n")


# What attach-info prints stands in the documents, word for word.
def blocks(document: str) -> str:
    """A document, without the indentation of its blocks."""
    return "\n".join(line.removeprefix("    ") for line in (ROOT / document).read_text().splitlines())


def test_attach_info_prints_what_the_documents_say() -> None:
    guests, images = blocks("docs/guests.md"), blocks("docs/cache-devices.md")
    swap = Definition("web", "8G", "none", options=(f"vhost={HOST.vhost('web')}",))
    golden = Definition("golden", source="/var/lib/images/golden.img")
    said = [(guests, attachment.texts(HOST, swap)), (guests, attachment.texts(HOST, swap, vhost=True))]
    said.append((images, attachment.texts(HOST, golden)))
    for document, texts in said:
        for kind, text in texts.items():
            if kind != "nbd":
                assert text.replace("virtio-web", "virtio-tmem") in document + "\n", (kind, text)
    assert "'file=" + said[0][1]["nbd"].strip() in guests


def test_a_door_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(
        PoolError, match=r"has no virtio door: put vhost=/run/tmemd-devices/web/vhost\.sock into OPTIONS"
    ):
        attachment.texts(HOST, Definition("web", "8G", "none"), vhost=True)
    assert "fstab" not in attachment.texts(HOST, Definition("web", source="/x", options=("write=through",)))


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("nbdkit: tmem: error: no luck\n\n", "no luck"),
        ("nbdkit: tmem: error: first\nnbdkit: tmem: error: second\nand more\n", "second"),
        ("sh: 1: exec: nbdkit: not found\n", "sh: 1: exec: nbdkit: not found"),
        ("nbdkit: error: Traceback (most recent call last):\n  File x\nKeyError: 3\n", "KeyError: 3"),
        ("", "it says nothing"),
    ],
)
def test_why_a_server_failed(log: str, reason: str) -> None:
    assert why(log) == reason
