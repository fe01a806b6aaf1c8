# SPDX-License-Identifier: BSD-3-Clause
"""Thaw a pool, or all: it accepts puts again."""

from __future__ import annotations

from functools import partial

from tmemd.cli import freeze

add_arguments = freeze.add_arguments
run = partial(freeze.run, frozen=False)
