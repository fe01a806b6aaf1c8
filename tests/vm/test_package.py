# SPDX-License-Identifier: BSD-3-Clause
"""The package in a bare Debian whose PID 1 is systemd: what the README says, word for word, and all that comes after.

`make test-package` builds the package first.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import uml
from tests.support.documents import commands_of, dead_links
from tests.support.harness import ROOT
from tests.support.verdict import HarnessError, second_chance

IMAGE = "build/vm/bare.img"
ARCHIVE = ROOT / "build/vm/archive"
CLIENT = ("python3-libnbd", "libnbd-bin")  # what is installed besides, to use a device
WELL, FAILED = ("all well\r\n", "FAILED\r\n")
SECONDS = 600  # a guard against a hang

pytestmark = [pytest.mark.vm, pytest.mark.timeout(2700), *uml.needs_uml]


@pytest.fixture(scope="module")
def package() -> Path:
    """The package that was built last."""
    (path,) = ROOT.glob("build/tmemd_*.deb")
    return path


def test_links_of_its_documents_lead_somewhere(package: Path, tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", package, tmp_path], check=True)
    documents = list((tmp_path / "usr/share/doc/tmemd").rglob("*.md"))
    assert {path: dead for path in documents if (dead := dead_links(path))} == {}
    assert len(documents) > 10


def repacked(package: Path, path: Path, *changes: tuple[str, str, str]) -> None:
    """Make a package that differs from another: in these files of its control, by these patterns."""
    tree = path.with_suffix("")
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    for name, old, new in changes:
        file = tree / "DEBIAN" / name
        text, count = re.subn(old, new, file.read_text())
        assert count, f"no {old} in {name}"
        file.write_text(text)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", tree, path], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def packages(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of a higher version, and one whose pools have another format."""
    path = tmp_path_factory.mktemp("packages")
    repacked(package, path / "tmemd-higher.deb", ("control", r"(?m)^(Version: .*)-\d+$", r"\1-2"))
    stranger = ("control", r"(?m)^(Version: )", r"\g<1>9:"), ("preinst", r"= '\d+'", "= '99'")
    repacked(package, path / "tmemd-stranger.deb", *stranger)
    return path


@pytest.fixture(scope="module")
def ready(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of a bare guest on which the package was installed, with all that apt brought for it, and purged."""
    uml.make(IMAGE, "build/ptrace.so")
    (ARCHIVE / "partial").mkdir(parents=True, exist_ok=True)  # what was fetched once is there
    status = f"Dir::State::status={ROOT}/{IMAGE}.status"
    command = ["apt-get", "-qq", "-o", status, "-o", f"Dir::Cache::archives={ARCHIVE}", "-o", "Debug::NoLocking=true"]
    command += ["install", "--yes", "--no-install-recommends", "--download-only", str(package), *CLIENT]
    subprocess.run(command, check=True)
    with (ARCHIVE / "Packages").open("wb") as index:
        subprocess.run(["dpkg-scanpackages", "--multiversion", "."], cwd=ARCHIVE, check=True, stdout=index)
    disk = tmp_path_factory.mktemp("ready") / "disk"
    subprocess.run(["cp", "--sparse=always", ROOT / IMAGE, disk], check=True)
    subprocess.run([ROOT / "tests/vm/package/install", disk, ARCHIVE, package.parent, *CLIENT], check=True)
    return disk


def boot(disk: Path, base: Path, *lines: str) -> None:
    """Boot a guest whose *disk* has what differs from *base*, and have it do these lines of a shell.

    AssertionError when something in the guest went wrong, HarnessError when the guest itself did.
    """
    end = """trap '[ $? = 0 ] || echo "scenario: FAILED"' EXIT"""
    said = uml.debian(
        disk.parent, "mem=512M", f"ubd0={disk},{base}", "root=/dev/ubda", "rw",
        script="\n".join(["set -e", end, f"cd /host{ROOT}", *lines, "echo scenario: all well"]), seconds=SECONDS,
    )  # fmt: skip
    print(said)
    if WELL not in said:
        if FAILED in said:
            raise AssertionError(said[said.index(FAILED) :])
        raise HarnessError("the guest did not come to an end")


def test_a_bare_machine_has_a_device_until_the_package_is_purged(disks: Path, packages: Path, ready: Path) -> None:
    _, commands, *_ = commands_of("README.md", "Install it")
    assert [line.split()[0] for line in commands] == ["apt", "tmemctl"]
    scenario = f"python3 -B -m tests.vm.package.scenario {{}} /host{packages}"
    inventory = "tests/vm/package/inventory | sort"

    def run() -> None:
        disk = disks / "disk"
        disk.unlink(missing_ok=True)
        boot(disk, ready, f"{inventory} >/root/before", "set -x", *commands, scenario.format("first"))
        boot(
            disk,
            ready,
            scenario.format("second"),
            r"printf 'SIZE=64M\nBACKING=nbd://store/far\n' >/etc/tmemd/far.conf",
            "apt purge tmemd 2>&1 | tee /root/said && rmdir /srv/swap",
            "grep 'what nbd://store/far has of it stays there' /root/said",
            f"{inventory} >/root/after && comm -13 /root/before /root/after >/root/left && cat /root/left",
            "[ ! -s /root/left ]",
        )

    second_chance(run)
