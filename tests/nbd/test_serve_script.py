"""scripts/serve: the same command again attaches."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.content import PAGE, content
from tests.support.harness import DEADLINE, ROOT, connect, device, wait_until


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
        serve = [str(ROOT / "scripts/serve"), "--socket", str(socket), "--pid-file", str(pid_file)]
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
