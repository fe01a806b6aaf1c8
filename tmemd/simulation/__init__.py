# SPDX-License-Identifier: BSD-3-Clause
"""Recordings of what pools did, and their replay through policies."""
