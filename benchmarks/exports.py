# SPDX-License-Identifier: BSD-3-Clause
"""Measure what one nbdkit with many exports takes beside its pools: memory under load and idle, CPU while idle."""

from __future__ import annotations

import argparse
import json
import sys

from tests.support import exports
from tests.support.harness import MIB


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--exports", type=int, default=100, help="and clients (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=16, help="requests each keeps in flight (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="length of the load (default: %(default)s)")
    parser.add_argument("--size", type=int, default=4 * MIB, help="bytes of each device (default: 4 MiB)")
    parser.add_argument("--threads", type=int, help="of each connection (default: what scripts/serve chooses)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    options = ["--threads", str(args.threads)] if args.threads else []
    result = exports.measure(args.exports, size=args.size, depth=args.depth, seconds=args.seconds, options=options)
    print(json.dumps(result, indent=1) if args.json else exports.render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
