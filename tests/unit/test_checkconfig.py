# SPDX-License-Identifier: BSD-3-Clause
"""What would fail at start is found without starting, each on a line of its own; and who may connect and attach."""

from __future__ import annotations

import grp
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.harness import wait_until
from tmemd.daemon.access import Flags, Grants, grants
from tmemd.daemon.checkconfig import problems
from tmemd.daemonconfig import AccessConfig, Address

GIB = 1 << 30
TOTAL = 8 * GIB


def found(directory: Path, text: str, *, flags: Flags | None = None, metrics: str | None = None) -> list[str]:
    """What is wrong with a file that says this, without the file's name."""
    path = directory / "tmemd.toml"
    path.write_text(text)
    address = Address.parse(metrics) if metrics else None
    lines = problems(path, TOTAL, flags=flags or Flags(), state=directory / "state", metrics=address)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_what_would_work_is_no_problem(tmp_path: Path) -> None:
    assert found(tmp_path, "") == []
    assert found(tmp_path, '[access]\ngroup = "root"\nallow_users = ["nobody", 4711]\nallow_groups = [0]') == []


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("polcy = 3", ["polcy: there is no such key"]),
        ('policy = "fairest"', ["policy: 'fairest' is no policy"]),
        ('[budget]\nminimum = "60%"', ["budget.minimum: 60% is more than budget.maximum"]),
        ('[pools.a]\nminimum = "5G"', ["pools: minimums of 5.00G in all"]),
        ('[tmpfs]\nsize = "1G"\n[pools.a]\nminimum = "2G"', ["minimums and fixed targets are 2.00G in all"]),
        (
            '[access]\ngroup = "nogroup1"\nallow_users = ["nobody1", "root"]\nallow_groups = ["nogroup2"]',
            [
                "access.group: there is no group 'nogroup1'",
                "access.allow_users: there is no user 'nobody1'",
                "access.allow_groups: there is no group 'nogroup2'",
            ],
        ),
        ('[metrics]\nlisten = "192.0.2.1:9632"', ["cannot serve metrics on 192.0.2.1:9632: "]),
    ],
)
def test_all_that_would_fail_is_said(tmp_path: Path, text: str, errors: list[str]) -> None:
    lines = found(tmp_path, text)
    assert [line[: len(error)] for line, error in zip(lines, errors, strict=True)] == errors


def test_what_was_set_by_hand_counts_against_the_budget(tmp_path: Path) -> None:
    (tmp_path / "state").write_text(f'{{"version":2,"pools":{{"a":{{"minimum":{3 * GIB}}},"b":{{"target":{GIB}}}}}}}')
    assert found(tmp_path, "") == []
    (line,) = found(tmp_path, '[pools.a]\nminimum = "1G"\n[pools.c]\nminimum = "1G"')
    assert line.startswith("minimums and fixed targets are 5.00G in all, those of ")
    (tmp_path / "state").write_text("{")
    (line,) = found(tmp_path, "")
    assert "the kept settings are damaged" in line


def test_an_address_that_another_has_is_a_problem_and_that_of_a_tmemd_is_none(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = found(directory, "", metrics=f"127.0.0.1:{port}")
        assert line.startswith(f"cannot serve metrics on 127.0.0.1:{port}: Address already in use")
    with fakes.tmemd(directory, f"--metrics=127.0.0.1:{port}") as running:
        wait_until(lambda: running.client.host().problems == [], "metrics")
        assert found(directory, f'[metrics]\nlisten = "127.0.0.1:{port}"') == []


def granted(flags: Flags | None = None, **config: object) -> tuple[int | None, set[int], set[int]]:
    given: Grants = grants(flags or Flags(), AccessConfig(**config))  # type: ignore[arg-type]
    assert given.wrong == ()
    return given.group, set(given.access.plugin_users), set(given.access.plugin_groups)


def test_flags_go_before_the_file_and_the_file_before_the_group_that_is_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = grp.getgrnam("nogroup")
    monkeypatch.setattr(grp, "getgrnam", {"tmemd": nobody}.__getitem__)
    gid = nobody.gr_gid
    assert granted() == ((gid, set(), {gid}) if os.geteuid() == 0 else (None, set(), set()))
    assert granted(group=5, allow_groups=()) == (5, set(), set())
    assert granted(allow_users=(7, "8"), group=5, allow_groups=(6,)) == (5, {7, 8}, {6})
    flags = Flags(1, (2, 3), (4,))
    assert granted(flags, allow_users=(7,), group=5, allow_groups=(6,)) == (1, {2, 3}, {4})
    monkeypatch.setattr(grp, "getgrnam", {}.__getitem__)
    assert granted() == (None, set(), set()), "without such a group"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives its socket to a group")
def test_who_may_connect_is_read_again(base: Path) -> None:
    def group() -> int:
        return (base / "socket").stat().st_gid

    with fakes.tmemd(base, config="[access]\ngroup = 5\n") as running:
        assert group() == 5
        (base / "tmemd.toml").write_text('[access]\ngroup = "nogroup1"\n')
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: running.client.host().problems != [], "it to be read")
        (problem,) = running.client.host().problems
        assert (problem.what, problem.words) == ("access", "access.group: there is no group 'nogroup1'")
        assert group() == os.getegid()
        (base / "tmemd.toml").write_text("[access]\ngroup = 6\n")
        running.process.send_signal(signal.SIGHUP)
        wait_until(lambda: running.client.host().problems == [], "it to be mended")
        assert group() == 6
