# SPDX-License-Identifier: BSD-3-Clause
"""A Ceph to try things with: one monitor and one OSD on this machine, until Ctrl-C, when nothing of it is left."""

from __future__ import annotations

import signal
import sys

from tests.ceph.cluster import Cluster
from tests.support import leftovers


def main() -> int:
    """Run it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leftovers.sweep()
    try:
        with leftovers.directory("/var/tmp") as base, Cluster(base) as cluster:
            cluster.make()
            print(f"export CEPH_CONF={cluster.configuration}", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
