# SPDX-License-Identifier: BSD-3-Clause
"""What libvirt's users get: devices that come with their guests, and saved guests that find their pages again."""
