# SPDX-License-Identifier: BSD-3-Clause
"""Python's way into the page path: a thin binding over tmemd/core."""
