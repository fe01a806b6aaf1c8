# SPDX-License-Identifier: BSD-3-Clause
"""A Ceph for all tests of this folder: it takes ten seconds to make."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ceph.cluster import Cluster
from tests.support import leftovers


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster that runs, with a pool for images."""
    with leftovers.directory("/var/tmp") as base, Cluster(base) as made:
        made.make()
        yield made
