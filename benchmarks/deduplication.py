# SPDX-License-Identifier: BSD-3-Clause
"""Measure what it would save to store pages of equal content once: within each image, and as if all were one.

Sizes are those of LZ4, as the pool compresses; pages of zeros take nothing in a pool and are not counted.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import lz4.block

from tests.support.content import PAGE

ZERO: Final = bytes(PAGE)


@dataclass
class Pages:
    """How often each content occurs, and what it takes."""

    counts: Counter[bytes] = field(default_factory=Counter)  # by digest
    nbytes: dict[bytes, int] = field(default_factory=dict)  # compressed

    def add(self, page: bytes) -> None:
        """Count a page."""
        digest = hashlib.blake2b(page, digest_size=16).digest()
        self.counts[digest] += 1
        if digest not in self.nbytes:
            self.nbytes[digest] = min(PAGE, len(lz4.block.compress(page, store_size=False)))

    def figures(self) -> str:
        """What is there, and which share of it is there already."""
        pages, stored = self.counts.total(), sum(self.nbytes[digest] * n for digest, n in self.counts.items())
        once = sum(self.nbytes.values())
        return (
            f"{pages} pages, {stored >> 20} MiB compressed; saved: {1 - len(self.nbytes) / pages:.1%} of the pages,"
            f" {1 - once / stored:.1%} of the bytes"
        )


def pages_of(image: Path) -> Iterator[bytes]:
    """The pages of an image that are not all zero; a last one that is not whole is left out."""
    with image.open("rb") as file:
        while len(page := file.read(PAGE)) == PAGE:
            if page != ZERO:
                yield page


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+")
    images = parser.parse_args().images
    together = Pages()
    for image in images:
        alone = Pages()
        for page in pages_of(image):
            alone.add(page)
            together.add(page)
        print(f"{image}: {alone.figures()}", flush=True)
    print(f"as one: {together.figures()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
