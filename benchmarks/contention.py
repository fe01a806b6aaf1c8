# SPDX-License-Identifier: BSD-3-Clause
"""Three guests want more RAM than there is: who gets how much, and how fast it changes hands."""

from __future__ import annotations

import argparse
import json
import sys

from tests.support import contention


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    result = contention.measure()
    print(json.dumps(result, indent=1) if args.json else contention.render(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
