# SPDX-License-Identifier: BSD-3-Clause
"""What gives each pool its target: what the host can spare, shared out by a policy."""
