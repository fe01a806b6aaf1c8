# SPDX-License-Identifier: BSD-3-Clause
"""A device as the plugin serves it: its configuration, its parts, its life cycle, its maintenance."""
