# SPDX-License-Identifier: BSD-3-Clause
"""What is done in the guest once the package is installed, and the README's device is made: it is used and managed.

    scenario.py first|second DIRECTORY

DIRECTORY has packages: one of a higher version, and one whose pools have another format. The first boot upgrades under
load, and ends with a drained device; the second must find every page, and removes it and installs it again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.systemd.scenario import DEVICES, await_progress, load, run, say, state, wait_until

KEPT = Path("/root/kept.json")
ELSEWHERE = Path("/srv/swap")
CONFIGURATION = Path("/etc/tmemd/tmemd.toml")
UNITS = [f"tmemd-device@{name}" for name in DEVICES]


def shown(unit: str, what: str) -> str:
    """A property of a unit."""
    return run(f"systemctl show --value --property {what} {unit}")


def check_confinement() -> None:
    """Units are as confined as can be asked for, and a device's user gets at nothing of another's."""
    for unit in ("tmemd", *UNITS):
        run(f"systemd-analyze security --threshold=30 {unit}")
    for name, other in (DEVICES, DEVICES[::-1]):
        backing = ELSEWHERE / "db" if name == "db" else Path("/var/lib/tmemd-devices/web")
        for path in (f"/run/tmemd/pools/{name}.pool", backing / "backing", backing / "backing.map"):
            run(f"runuser -u tmemd-{name} -- test -r {path}")
            run(f"! runuser -u tmemd-{other} -- test -r {path}")
        run(f"! runuser -u tmemd-{other} -- test -w /run/tmemd-devices/{name}.sock")
        run(f"! runuser -u tmemd-{other} -- tmemctl set {name} --weight 1")
    say("nobody gets at another's")


@contextmanager
def same(units: list[str], what: str, expected: bool) -> Iterator[None]:
    """A property of these units is the same after a with block, or another."""
    before = [shown(unit, what) for unit in units]
    yield
    after = [shown(unit, what) for unit in units]
    assert [old == new for old, new in zip(before, after, strict=True)] == [expected] * len(units), (before, after)


def upgrade(packages: Path) -> dict[int, int]:
    """A package that cannot have these pools changes nothing, and a higher version fails no request.

    Returns what was written.
    """
    kept: dict[int, int] = {}
    sockets = [f"{unit}.socket" for unit in UNITS]
    run(f"echo '# as the administrator wants it' >>{CONFIGURATION}")
    with load(kept) as clients:
        with same(UNITS, "MainPID", True):
            said = run(f"! apt install {packages}/*stranger*.deb")
            assert "web.pool (format" in said, said
            assert run("dpkg --audit") == ""
            await_progress(clients)
        say("a package with another format of pools is refused")
        with same(sockets, "ActiveEnterTimestampMonotonic", True), same(["tmemd", *UNITS], "MainPID", False):
            run(f"apt install {packages}/*higher*.deb")
        await_progress(clients)
        say("upgraded")
    assert run("dpkg-query -W -f '${Version}' tmemd").endswith("-2")
    assert "as the administrator wants it" in CONFIGURATION.read_text()
    return kept


def first(packages: Path) -> None:
    """The first boot."""
    run(f"mkdir {ELSEWHERE} && tmemctl create db --size 64M --backing {ELSEWHERE}")
    say("made db")
    KEPT.write_text(json.dumps(list(upgrade(packages).items())))
    check_confinement()
    run("tmemctl freeze web && tmemctl drain web && tmemctl stop web && tmemctl drain web && tmemctl thaw web")


def second(packages: Path) -> None:
    """The boot after that."""
    kept = dict(json.loads(KEPT.read_text()))
    wait_until(lambda: {state(unit) for unit in ("tmemd", *UNITS)} == {"active"}, "all units")
    with load(kept):
        say("all is there")
    run("apt remove tmemd")
    assert {state(f"{unit}.{kind}") for unit in UNITS for kind in ("socket", "service")} == {"inactive"}
    run(f"apt install {packages}/*higher*.deb")
    with load(kept):
        say("removed, and there again")


def main() -> None:
    """Do what the command line says, and say how it ended."""
    boot, packages = sys.argv[1], Path(sys.argv[2])
    try:
        first(packages) if boot == "first" else second(packages)
    except BaseException:
        say("this went wrong")
        subprocess.run(["journalctl", "--no-pager", "--boot", "--lines=80", "--output=short-monotonic"], check=False)
        raise
    say("well")


if __name__ == "__main__":
    main()
