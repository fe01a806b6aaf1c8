# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tmemd.cli`` is tmemctl."""

import sys

from tmemd.cli import main

sys.exit(main())
