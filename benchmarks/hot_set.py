# SPDX-License-Identifier: BSD-3-Clause
"""In a guest: a database that is read by chance, a few of its rows far more often than the others.

Usage: python3 -m benchmarks.hot_set FILE

Makes FILE, says that it is there, and reads until it is killed. The row of rank N is asked for in proportion to 1/N;
those that are asked for often lie scattered over the file.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import sys
from typing import Final

ROWS: Final = 250_000
ROW_BYTES: Final = 450  # a page holds eight; all of them are 125 MiB
STRIDE: Final = 104_729  # a prime: every row has its rank


def make(file: str) -> sqlite3.Connection:
    """Make the database."""
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE row (key INTEGER PRIMARY KEY, value BLOB)")
    database.executemany("INSERT INTO row VALUES (?, ?)", ((key, random.randbytes(ROW_BYTES)) for key in range(ROWS)))
    database.commit()
    return database


def read(database: sqlite3.Connection) -> None:
    """Read for ever."""
    weights = list(itertools.accumulate(1 / rank for rank in range(1, ROWS + 1)))
    while True:
        for rank in random.choices(range(ROWS), cum_weights=weights, k=1000):
            database.execute("SELECT value FROM row WHERE key = ?", (rank * STRIDE % ROWS,)).fetchone()


if __name__ == "__main__":
    database = make(sys.argv[1])
    print("the database is there", flush=True)
    read(database)
