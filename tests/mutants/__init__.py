# SPDX-License-Identifier: BSD-3-Clause
"""Mutation tests: break the code by rule, and see whether the tests notice. `python -m tests.mutants --help`."""
