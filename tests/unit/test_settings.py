from __future__ import annotations

from contextlib import closing
from pathlib import Path

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
    with pytest.raises(PoolError, match=f"^{path}: the kept settings are damaged"):
        SettingsStore(path)
    assert path.read_bytes() == damage


def test_two_cannot_keep_their_settings_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with closing(SettingsStore(path)), pytest.raises(PoolError, match="another tmemd keeps its settings in"):
        SettingsStore(path)
    SettingsStore(path).close()


def test_what_cannot_be_written_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with closing(SettingsStore(path)) as store:
        store.change({"web": Overrides(weight=9)})
        # Even root cannot write to a directory.
        (tmp_path / "settings.json.new").mkdir()
        with pytest.raises(PoolError, match=f"cannot keep settings in {path}: Is a directory"):
            store.change({"web": Overrides(weight=10)})
        assert store.of("web").weight == 9
        (tmp_path / "settings.json.new").rmdir()
        store.change({"web": Overrides(weight=11)})
    with closing(SettingsStore(path)) as store:
        assert store.of("web").weight == 11


def test_a_state_file_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PoolError, match=r"cannot keep settings in .*/file/settings.json: File exists"):
        SettingsStore(tmp_path / "file/settings.json")


def test_no_descriptors_are_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with closing(SettingsStore(tmp_path / "settings.json")) as store:
        for weight in range(1, 20):
            store.change({"web": Overrides(weight=weight)})
    (tmp_path / "settings.json").write_bytes(b"damaged")
    for _ in range(20):
        with pytest.raises(PoolError):
            SettingsStore(tmp_path / "settings.json")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
