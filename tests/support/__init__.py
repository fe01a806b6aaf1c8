# SPDX-License-Identifier: BSD-3-Clause
"""What tests and benchmarks share. They import from here, never from each other (tests/unit/test_imports.py)."""
