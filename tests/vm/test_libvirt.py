# SPDX-License-Identifier: BSD-3-Clause
"""What the documents have one tell libvirt: the guest starts, and nbdkit's death fails none of its requests."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.content import compressible
from tests.support.harness import ROOT, Serve, Server, cache_device, counters, device, doors
from tests.support.leftovers import all_dying_with_us
from tests.support.qemu import KERNELS, goes_on, needs_qemu, pages_done

NAMESPACE = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"

pytestmark = [pytest.mark.vm, *needs_qemu]
pytest.importorskip("libvirt", reason="no libvirt for Python")


def documented(tag: str, about: str, document: str = "guests.md") -> str:
    """The element of that name in the document in which there is *about*."""
    text = (ROOT / "docs" / document).read_text()
    elements = re.findall(rf"^ +<{tag}\b.*?</{tag}>$", text, flags=re.MULTILINE | re.DOTALL)
    (found,) = (each for each in elements if about in each)
    return str(found)


@contextmanager
def guest(base: Path, initrd: Path, machine: str, element: str) -> Iterator[Callable[[], int]]:
    """A domain that runs for the length of a with block; yields what tells how many pages it has written and read back.

    That raises AssertionError when a request failed, or the domain ended.
    """
    log = base / "console"
    in_devices = "" if element.lstrip().startswith("<qemu:") else element
    memory, serial = (documented("memoryBacking", "memfd"), "web") if "vhostuser" in element else ("", "tmem")
    xml = base / "domain.xml"
    xml.write_text(f"""<domain type='qemu' {NAMESPACE}>
      <name>web</name><memory unit='MiB'>256</memory>{memory}
      <os>
        <type arch='x86_64' machine='{machine}'>hvm</type>
        <kernel>{KERNELS[-1]}</kernel><initrd>{initrd}</initrd>
        <cmdline>console=ttyS0 quiet nowatchdog serial={serial}</cmdline>
      </os>
      <devices><serial type='file'><source path='{log}'/></serial>{in_devices}</devices>
      {element if not in_devices else ""}
    </domain>""")
    run: list[str | Path] = [sys.executable, "-m", "tests.vm.libvirt.domain", base / "libvirt", xml]
    with subprocess.Popen(
        all_dying_with_us(run), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:

        def pages_so_far() -> int:
            assert process.poll() is None, process.communicate()[0].decode()
            return pages_done(log)

        try:
            yield pages_so_far
        finally:
            process.kill()


def survives(server: Server, base: Path, initrd: Path, machine: str, element: str) -> None:
    """Kill the server twice while a guest writes and reads back; no request may fail."""
    with guest(base, initrd, machine, element) as pages_so_far:
        for _ in range(2):
            goes_on(pages_so_far)
            server.kill()
            server.start()
        goes_on(pages_so_far)


@pytest.mark.parametrize("kind", ["pc qemu:commandline", "q35 qemu:commandline", "pc disk"])
def test_a_guest_survives_its_server(serve: Serve, pools: Path, disks: Path, initrd: Path, kind: str) -> None:
    server = serve(device("web", pools, "64M", disks / "backing", "64M"))
    machine, tag = kind.split()
    element = documented(tag, "/web.sock").replace("/run/tmemd-devices/web.sock", str(server.socket))
    survives(server, disks, initrd, machine, element)


def test_a_guest_that_shares_its_memory_survives_its_server(
    serve: Serve, pools: Path, disks: Path, initrd: Path
) -> None:
    server = serve(device("web", pools, "64M", disks / "backing", "64M"), door="vhost")
    element = documented("disk", "/web/vhost.sock").replace("/run/tmemd-devices/web/vhost.sock", str(server.vhost))
    survives(server, disks, initrd, "q35", element)
    assert doors(pools / "web.pool").requests


def test_a_guest_whose_disk_is_an_overlay_survives_the_server_of_the_image(
    serve: Serve, pools: Path, disks: Path, initrd: Path
) -> None:
    image, overlay = disks / "golden", disks / "guest1.qcow2"
    image.write_bytes(b"".join(compressible(page, 1) for page in range(16384)))
    server = serve(cache_device("golden", pools, image, "128M"))
    uri = f"nbd+unix:///golden?socket={server.socket}"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", str(overlay)]
    subprocess.run(make, check=True)
    element = documented("qemu:commandline", "/golden.sock", "cache-devices.md")
    for old, new in (
        ("/run/tmemd-devices/golden.sock", str(server.socket)),
        ("/var/lib/libvirt/images/guest1.qcow2", str(overlay)),
        ('"drive":"disk"', '"drive":"disk","serial":"tmem"'),
    ):
        assert old in element
        element = element.replace(old, new)
    survives(server, disks, initrd, "pc", element)
    assert counters(pools / "golden.pool").gets
