# SPDX-License-Identifier: BSD-3-Clause
"""Block traces are read as they were written, and from the log of an NBD server."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import blocktrace
from tests.support.blocktrace import Access, Op
from tests.support.harness import MIB, ROOT, connect, wait_until
from tests.support.leftovers import dying_with_us

TRACES = sorted((ROOT / "benchmarks" / "traces").glob("*.csv.xz"))


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = [Access(0, 0, Op.READ, 5, 32), Access(7, 1, Op.WRITE, 1 << 40, 1), Access(9, 0, Op.TRIM, 0, 256)]
    blocktrace.write(tmp_path / "trace", trace)
    assert list(blocktrace.read(tmp_path / "trace")) == trace


def test_requests_are_found_in_what_nbdkit_logs(tmp_path: Path) -> None:
    """Those of the second client to ask are its; a request that ends within a page counts the page."""
    image, socket, log = (tmp_path / name for name in ("image", "socket", "log"))
    image.write_bytes(bytes(MIB))
    with subprocess.Popen(
        dying_with_us(["nbdkit", "-f", "-U", socket, "--filter=log", "file", image, f"logfile={log}"])
    ) as server:
        try:
            wait_until(socket.exists, "nbdkit")
            idle, first, second = (connect(socket) for _ in range(3))
            second.pread(4096, 8192)
            first.pwrite(bytes(8192), 4096)
            second.pread(512, 4096 - 256)
            first.trim(65536, 65536)
            first.zero(4096, 0)
            for each in (idle, first, second):
                each.shutdown()
        finally:
            server.kill()
    trace = list(blocktrace.logged(log.read_text().splitlines()))
    assert [access[1:] for access in trace] == [
        (0, Op.READ, 2, 1),
        (1, Op.WRITE, 1, 2),
        (0, Op.READ, 0, 2),
        (1, Op.TRIM, 16, 16),
        (1, Op.TRIM, 0, 1),
    ]
    assert trace[0].ms == 0
    assert [access.ms for access in trace] == sorted(access.ms for access in trace)


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name)
def test_what_was_recorded_can_be_read(path: Path) -> None:
    trace = list(blocktrace.read(path))
    assert all(access.ms >= 0 and access.page >= 0 and access.pages > 0 for access in trace)
    assert sum(access.pages for access in trace if access.op is Op.READ) > 0


def test_another_file_is_refused(tmp_path: Path) -> None:
    blocktrace.write(tmp_path / "trace", [])
    assert list(blocktrace.read(tmp_path / "trace")) == []
    subprocess.run(["xz"], input=b"a,b\n", stdout=(tmp_path / "other").open("wb"), check=True)
    with pytest.raises(ValueError, match="no block trace"):
        list(blocktrace.read(tmp_path / "other"))
