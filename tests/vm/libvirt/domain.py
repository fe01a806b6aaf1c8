# SPDX-License-Identifier: BSD-3-Clause
"""Run a libvirt domain, resumed whenever it is paused, until we are killed: domain.py DIRECTORY XML.

libvirt's QEMU driver works in this process, without a daemon, and keeps what it has below the directory. QEMU outlives
us: run this in a process namespace of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import libvirt

CONFIG = """
user = "root"
group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
remember_owner = 0
stdio_handler = "file"
"""


def handle_events() -> None:
    """libvirt wants somebody to."""
    while True:
        libvirt.virEventRunDefaultImpl()


def main() -> None:
    """Run it."""
    directory, xml = Path(sys.argv[1]), Path(sys.argv[2])
    (directory / "etc").mkdir(parents=True)
    (directory / "etc" / "qemu.conf").write_text(CONFIG)
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=handle_events, daemon=True).start()
    domain = libvirt.open(f"qemu:///embed?root={directory}").createXML(xml.read_text())
    while True:
        if domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            domain.resume()
        time.sleep(0.2)


if __name__ == "__main__":
    main()
