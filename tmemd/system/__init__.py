# SPDX-License-Identifier: BSD-3-Clause
"""What is asked of the operating system, and only of it."""
