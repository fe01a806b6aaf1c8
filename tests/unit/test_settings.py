# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tmemd.daemonconfig import parse_config
from tmemd.settings import Overrides, PoolSettings, SettingsStore, changed, merge
from tmemd.store.poolfile import PoolError

MIB = 1 << 20


def test_what_was_set_goes_before_the_configuration_and_that_before_the_defaults() -> None:
    config = parse_config('[pools.web]\nweight = 7\ncap = "5M"\ncompression = false').pools["web"]
    assert merge(Overrides(), config) == PoolSettings(weight=7, cap=5 * MIB, compression=False)
    assert merge(Overrides(weight=9, frozen=True, target=3), config) == PoolSettings(
        weight=9, cap=5 * MIB, compression=False, frozen=True, target=3
    )
    assert merge(Overrides(cap=None), config).cap is None
    assert merge(Overrides()) == PoolSettings()


def test_unset_changes_nothing_and_none_does() -> None:
    before = Overrides(weight=9, cap=MIB)
    assert changed(before, weight=msgspec.UNSET, cap=None, target=MIB) == Overrides(weight=9, cap=None, target=MIB)


def test_what_is_kept_is_there_again_and_what_is_dropped_is_not(tmp_path: Path) -> None:
    path = tmp_path / "of/its own/settings.json"
    kept = {"web": Overrides(weight=9, cap=None, frozen=True), "db": Overrides(minimum=MIB, compression=False)}
    with closing(SettingsStore(path)) as store:
        store.change(kept)
    with closing(SettingsStore(path)) as store:
        assert store.names() == ["db", "web"]
        assert {name: store.of(name) for name in store.names()} == kept
        store.change({"web": Overrides()})
    assert path.stat().st_mode & 0o777 == 0o600
    with closing(SettingsStore(path)) as store:
        assert store.names() == ["db"]
        assert store.of("web") == Overrides()


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"version":1,"pools":{"web":{"wei',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"version":3,"pools":{}}',
        b'{"version":1,"pools":{"../web":{}}}',
        b'{"version":1,"pools":{"web":{"weight":0}}}',
        b'{"version":1,"pools":{"web":{"colour":"red"}}}',
        b'{"version":1,"pools":{"web":{"cap":-1}}}',
    ],
)
def test_a_damaged_file_is_named_and_kept(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(damage)
    with closing(SettingsStore(path)) as store:
        assert (store.problem or "").startswith(f"{path}: the kept settings are damaged")
        store.change({"web": Overrides(weight=9)})
        assert store.of("web").weight == 9
        assert store.problem
    assert path.read_bytes() == damage


def test_a_damaged_file_that_is_mended_says_what_it_said_and_what_was_set_since_goes_before(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    names = ("web", "db", "gone", "theirs")
    with closing(SettingsStore(path)) as store:
        store.change({name: Overrides(weight=7, minimum=MIB, owner=1) for name in names})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with closing(SettingsStore(path)) as store:
        store.change({"web": Overrides(weight=9, owner=1), "gone": Overrides(), "theirs": Overrides(weight=9, owner=2)})
        path.write_bytes(whole)
        store.change({})
        assert store.problem is None
    with closing(SettingsStore(path)) as store:
        assert {name: store.of(name) for name in store.names()} == {
            "web": Overrides(weight=9, minimum=MIB, owner=1),
            "db": Overrides(weight=7, minimum=MIB, owner=1),
            "theirs": Overrides(weight=9, owner=2),
        }


def test_what_a_killed_writer_left_half_done_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.with_name("settings.json.new").write_bytes(b"x" * 100_000)
    with closing(SettingsStore(path)) as store:
        store.change({"web": Overrides(weight=9)})
    with closing(SettingsStore(path)) as store:
        assert store.of("web") == Overrides(weight=9)


def test_a_damaged_file_that_is_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(b"damaged")
    with closing(SettingsStore(path)) as store:
        store.change({"web": Overrides(weight=9)})
        path.rename(tmp_path / "aside")
        store.change({})
        assert store.problem is None
    with closing(SettingsStore(path)) as store:
        assert store.of("web").weight == 9


def test_two_cannot_keep_their_settings_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with closing(SettingsStore(path)), pytest.raises(PoolError, match="another tmemd keeps its settings in"):
        SettingsStore(path)
    SettingsStore(path).close()


def test_what_cannot_be_written_holds_and_is_written_when_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with closing(SettingsStore(path)) as store:
        store.change({"web": Overrides(weight=9), "gone": Overrides(weight=9)})
        before = path.read_bytes()
        # Even root cannot write to a directory.
        (tmp_path / "settings.json.new").mkdir()
        store.change({"web": Overrides(weight=10), "gone": Overrides()})
        assert (store.problem or "").startswith(f"cannot keep settings in {path}: Is a directory")
        assert (store.of("web").weight, store.names()) == (10, ["web"])
        assert path.read_bytes() == before
        (tmp_path / "settings.json.new").rmdir()
        store.change({})
        assert store.problem is None
    with closing(SettingsStore(path)) as store:
        assert (store.of("web").weight, store.names()) == (10, ["web"])


def test_a_place_that_comes_later_is_used_then(tmp_path: Path) -> None:
    (tmp_path / "var").write_bytes(b"")
    with closing(SettingsStore(tmp_path / "var/settings.json")) as store:
        assert re.match(r"cannot keep settings in .*/var/settings.json: File exists", store.problem or "")
        store.change({"web": Overrides(weight=9)})
        (tmp_path / "var").unlink()
        store.change({})
        assert store.problem is None
        assert (tmp_path / "var/settings.json").exists()
        with pytest.raises(PoolError, match="another tmemd"):
            SettingsStore(tmp_path / "var/settings.json")


def test_a_change_is_synced_before_it_is_there_and_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming what is not synced can leave an empty file when the host dies, and a rename not synced the old one."""
    path, done = tmp_path / "settings.json", list[str]()

    def seen(name: str, call: Callable[..., Any], what: Callable[..., Path]) -> None:
        def recorded(*arguments: Any, **keywords: Any) -> Any:
            known = what(*arguments).name
            result = call(*arguments, **keywords)
            done.append(f"{name} {known}")
            return result

        monkeypatch.setattr(os, name, recorded)

    with closing(SettingsStore(path)) as store:
        for name in ("fsync", "fdatasync", "write"):
            seen(name, getattr(os, name), lambda fd, *_: Path(f"/proc/self/fd/{fd}").readlink())
        for name in ("replace", "rename"):
            seen(name, getattr(os, name), lambda old, *_: Path(old))
        store.change({"web": Overrides(weight=9)})
    order = [step for step in done if not step.startswith("write")]
    assert order == ["fsync settings.json.new", "replace settings.json.new", f"fsync {tmp_path.name}"]


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_nobody_else_can_open_the_lock(tmp_path: Path, mode: int) -> None:
    """To lock a file it is enough to be able to read it."""
    lock = tmp_path / "settings.json.lock"
    lock.touch()
    lock.chmod(mode)
    with closing(SettingsStore(tmp_path / "settings.json")):
        assert lock.stat().st_mode & 0o777 == 0o600


def test_a_lock_that_is_no_file_of_ours_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"x")
    (tmp_path / "settings.json.lock").symlink_to(tmp_path / "victim")
    with closing(SettingsStore(tmp_path / "settings.json")) as store:
        assert "cannot keep settings" in (store.problem or "")
    assert (tmp_path / "victim").stat().st_mode & 0o777 != 0o600


def test_no_descriptors_are_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(SettingsStore(tmp_path / "settings.json")) as store:
        for weight in range(1, 20):
            store.change({"web": Overrides(weight=weight)})
        for _ in range(20):
            with pytest.raises(PoolError):
                SettingsStore(tmp_path / "settings.json")
    (tmp_path / "settings.json").write_bytes(b"damaged")
    for _ in range(20):
        SettingsStore(tmp_path / "settings.json").close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
