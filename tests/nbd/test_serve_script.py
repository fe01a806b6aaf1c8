# SPDX-License-Identifier: BSD-3-Clause
"""scripts/serve: the same command again attaches; of an image it says what to type for a guest."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbd
import pytest

from tests.support.content import PAGE, compressible, content
from tests.support.harness import DEADLINE, ROOT, connect, device, wait_until

SERVE = str(ROOT / "scripts/serve")


@contextmanager
def serving(command: list[str], pid_file: Path) -> Iterator[subprocess.Popen[str]]:
    pid_file.unlink(missing_ok=True)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: pid_file.exists() or process.poll() is not None, "nbdkit to listen")
            yield process
        finally:
            process.kill()


def test_the_same_command_again_attaches_after_a_kill_and_leaves_a_living_server_alone(pools: Path, disk: Path) -> None:
    with tempfile.TemporaryDirectory() as run:
        socket, pid_file = Path(run) / "nbd.sock", Path(run) / "pid"
        serve = [SERVE, "--socket", str(socket), "--pid-file", str(pid_file)]
        command = serve + device("web", pools, "4M", disk, "8M")
        with serving(command, pid_file):
            connect(socket).pwrite(content(1, 1), PAGE)
        assert socket.is_socket()
        with serving(command, pid_file):
            other = subprocess.run(
                serve + device("other", pools, "4M", "none", "8M"),
                capture_output=True, text=True, timeout=DEADLINE, check=False,
            )  # fmt: skip
            assert other.returncode != 0
            assert "in use" in other.stderr
            assert connect(socket).pread(PAGE, PAGE) == content(1, 1)


@contextmanager
def serving_image(image: Path, socket: Path, pools: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Serve it in a session of its own, as a terminal's; yields also what was printed."""
    command = [SERVE, "--image", str(image), "--socket", str(socket), *options, f"pools={pools}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout
            said = ""
            while "reconnect-delay" not in said and (line := process.stdout.readline()):
                said += line
            yield process, said
        finally:
            process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A golden image."""
    path = tmp_path / "golden.img"
    path.write_bytes(b"".join(compressible(page, 1) for page in range(1024)))
    return path


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_guest_reads_the_image_below_the_overlay_that_is_told(
    pools: Path, tmp_path: Path, image: Path, kind: str
) -> None:
    golden = tmp_path / f"golden.{kind}"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, image, golden], check=True)
    with serving_image(golden, tmp_path / "nbd.sock", pools) as (_, said):
        handle = connect(tmp_path / "nbd.sock", "golden")
        assert handle.is_read_only()
        assert handle.pread(PAGE, PAGE) == golden.read_bytes()[PAGE : 2 * PAGE]
        (make,) = re.findall("qemu-img create .*", said)
        subprocess.run(shlex.split(make), cwd=tmp_path, check=True)
        compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", "guest1.qcow2", str(image)]
        subprocess.run(compare, cwd=tmp_path, check=True)


def test_ctrl_c_leaves_nothing_but_the_pool_and_answers_no_guest_with_an_error(
    pools: Path, tmp_path: Path, image: Path
) -> None:
    socket, pid_file = tmp_path / "nbd.sock", tmp_path / "pid"
    with serving_image(image, socket, pools, "--pid-file", str(pid_file)) as (process, _):
        handle = connect(socket)
        pid = int(pid_file.read_text())
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(DEADLINE) == 130
        assert not Path(f"/proc/{pid}").exists()
        assert not socket.exists()
        with pytest.raises(nbd.Error) as error:
            handle.pread(PAGE, 0)
        assert error.value.errno in {None, "EPIPE", "ECONNRESET", "ENOTCONN"}
    with serving_image(image, socket, pools):
        assert connect(socket).pread(PAGE, 0) == compressible(0, 1)


def test_one_guest_may_write_to_the_image(pools: Path, tmp_path: Path, image: Path) -> None:
    with serving_image(image, tmp_path / "nbd.sock", pools, "--write") as (_, said):
        assert "-drive 'file=nbd+unix:///golden?socket=" in said
        connect(tmp_path / "nbd.sock").pwrite(content(1, 2), PAGE)
        assert image.read_bytes()[PAGE : 2 * PAGE] == content(1, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "missing"], "serve: missing: is not there\n"),
        (["--image", "golden.img", "--limit", "4K"], "limit=4096 is below the"),
        (["--image", "golden.img", "--name", "a b"], "name=a b: a name is 1 to 63"),
        (["--image", "golden.qcow2", "--write"], "golden.qcow2 is a qcow2 image"),
        (["--image", "golden.img", "--port", "10809"], "an image is served on a unix socket"),
        (["--write", "name=x"], "--write and --name are for --image"),
    ],
)
def test_what_is_wrong_with_an_image_is_said(tmp_path: Path, image: Path, options: list[str], said: str) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, tmp_path / "golden.qcow2"], check=True)
    socket = tmp_path / "nbd.sock"
    done = subprocess.run(
        [SERVE, "--socket", str(socket), *options, f"pools={tmp_path}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert done.returncode in {1, 2}
    assert said in done.stderr
    assert not socket.exists()
