# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tmemd.libvirt`` is tmemd-libvirt."""

import sys

from tmemd.libvirt.program import main

sys.exit(main())
