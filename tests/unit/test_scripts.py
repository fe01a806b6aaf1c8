# SPDX-License-Identifier: BSD-3-Clause
"""The shell scripts, as far as they go without a guest."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.harness import ROOT

SCRIPTS = [path for path in (ROOT / "scripts").iterdir() if path.is_file() and os.access(path, os.X_OK)]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="attach and detach want root before they look at a device")


def run(script: str, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "scripts" / script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS))
def test_help(script: str) -> None:
    done = run(script, ["--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")
    assert "set -euo" not in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("attach", []),
        ("attach", ["--priority", "32768", "/dev/null"]),
        ("attach", ["--surprise", "/dev/null"]),
        ("detach", []),
        ("serve", []),
        ("serve", ["--socket"]),
        ("boot-guest", ["--attach", "pigeon", "nbd://127.0.0.1/x", "true"]),
        ("boot-guest", ["--attach", "nbd", "nbd://192.0.2.1/x", "true"]),
        ("guest-session", []),
    ],
)
def test_bad_usage_shows_the_usage(script: str, arguments: list[str]) -> None:
    done = run(script, arguments)
    assert done.returncode == 2
    assert "Usage: " in done.stderr


@needs_root
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_machine_does_not_swap_onto_its_own_server(host: str) -> None:
    done = run("attach", [f"nbd://{host}:10809/x"])
    assert done.returncode == 1
    assert "not supported" in done.stderr


@needs_root
def test_attach_says_that_the_network_is_not_up() -> None:
    alone = ["unshare", "--net", str(ROOT / "scripts/attach"), "nbd://192.0.2.1:10809/x"]
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("attach: no route to 192.0.2.1 ")
    assert done.stderr.endswith("is the network up?\n")


@needs_root
def test_attach_wants_a_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("attach", [str(tmp_path / "file")])
    assert done.returncode == 1
    assert done.stderr == f"attach: {tmp_path}/file is not a block device\n"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    """A block device of 4 MiB."""
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(4 << 20)
    made = subprocess.run(["losetup", "--find", "--show", file.name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"needs a loop device: {made.stderr}")
    path = made.stdout.strip()
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


NOT_OURS = "detach: attach did not make the swap area on {} (label '{}'): it is off, and stays\n"


@needs_root
@pytest.mark.parametrize(
    ("made", "left", "said"),
    [
        ([ROOT / "scripts/attach"], "", ""),
        (["mkswap", "--quiet"], "swap\n", NOT_OURS.format("{}", "")),
        (["mkswap", "--quiet", "--label", "db"], "swap\n", NOT_OURS.format("{}", "db")),
    ],
    ids=["attach", "mkswap", "labelled"],
)
def test_detach_wipes_only_what_attach_made(
    tmp_path: Path, loop: str, made: list[str | Path], left: str, said: str
) -> None:
    for command in ("swapon", "swapoff"):
        (tmp_path / command).write_text(f"#!/bin/sh\necho {command} $* >>{tmp_path}/done\n")
        (tmp_path / command).chmod(0o755)
    # attach refuses /dev/loop*; under another path it is a disk like any other.
    device = tmp_path / Path(loop).name
    os.mknod(device, stat.S_IFBLK | 0o600, Path(loop).stat().st_rdev)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([*map(str, made), str(device)], env=environment, check=True, capture_output=True)
    (tmp_path / "swaps").write_text(f"Filename Type Size Used Priority\n{device} partition 4092 0 100\n")
    detach = f"mount --bind {tmp_path}/swaps /proc/swaps && exec {ROOT}/scripts/detach {device}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", detach], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said.format(device))
    assert (tmp_path / "done").read_text().splitlines()[-1] == f"swapoff {device}"
    probe = ["blkid", "--probe", "--match-tag", "TYPE", "--output", "value", str(device)]
    kind = subprocess.run(probe, capture_output=True, text=True, check=False)
    assert kind.stdout == left


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    for unit in (ROOT / "scripts/systemd").iterdir():
        # What is not installed here is no fault of the unit's.
        text = re.sub("=tmemd(-libvirt)? ", "=/bin/true ", unit.read_text())
        (tmp_path / unit.name.replace("@", "@example")).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    subprocess.run([sys.executable, ROOT / "scripts/manpages.py", tmp_path / "man"], cwd=ROOT, check=True)
    environment = os.environ | {"MANPATH": f"{tmp_path}/man"}
    verify = ["systemd-analyze", "verify", *units]
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_our_own_processes_are_stopped() -> None:
    stop = f"source {ROOT}/scripts/common.sh; sleep 1000 & processes=($! $1); stop_processes ${{processes[@]}}; wait $!"
    with subprocess.Popen(["sleep", "1000"]) as stranger:
        try:
            done = subprocess.run(["bash", "-c", stop, "bash", str(stranger.pid)], check=False)
            assert done.returncode == 128 + signal.SIGTERM
            assert stranger.poll() is None
        finally:
            stranger.kill()


@needs_root
@pytest.mark.skipif(not Path("/dev/kmsg").exists(), reason="needs /dev/kmsg")
def test_a_guest_is_up_before_its_disk_is_read(tmp_path: Path) -> None:
    (tmp_path / "modprobe").write_text("#!/bin/sh\necho $*\nexit 1\n")
    (tmp_path / "modprobe").chmod(0o755)
    session = f"mount --bind /dev/null /dev/kmsg && PATH={tmp_path}:$PATH exec {ROOT}/scripts/guest-session /dev/vda"
    done = subprocess.run(["unshare", "--mount", "sh", "-c", session], capture_output=True, text=True, check=False)
    assert done.stdout == "guest: up\nvirtio_blk\n"


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_purging_says_what_stays(tmp_path: Path, quote: str) -> None:
    uri, image = "nbd+unix:///web?socket=/run/rbd.sock", tmp_path / "image"
    image.touch()
    definition = tmp_path / "web.conf"
    definition.write_text(f"SIZE=8G\nBACKING={quote}{uri}{quote}\nSOURCE={quote}{image}{quote}\n")
    each = 'for key in BACKING SOURCE; do remove_elsewhere "$(value $key "$1")" web; done'
    script = f". scripts/debian/tmemd.postrm; {each}"
    done = subprocess.run(["sh", "-c", script, "sh", definition], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == f"  what {uri} has of it stays there\n  its {image} stays\n"
    assert image.exists()
