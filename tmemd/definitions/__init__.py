# SPDX-License-Identifier: BSD-3-Clause
"""Devices of this host as they are defined: their definitions, accounts, files and services."""
