# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tmemd.daemon`` is tmemd."""

import sys

from tmemd.daemon import main

sys.exit(main())
