# SPDX-License-Identifier: BSD-3-Clause
"""The files of a pool and of a map: their formats, and what other processes may read and write of them."""
