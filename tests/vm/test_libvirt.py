# SPDX-License-Identifier: BSD-3-Clause
"""What the documents have one tell libvirt: guests start and swap, and what becomes of them in each event."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import leftovers, virt
from tests.support.content import compressible
from tests.support.harness import wait_until
from tests.support.qemu import needs_qemu
from tests.support.remotes import Remote
from tests.support.virt import Guest, Host, documented
from tmemd.libvirt.domain import NAMESPACE

DISK = documented("disk", "/web.sock")
SAVE = "/var/lib/libvirt/images/web.save"
RUN_SINCE = "its guest has run since"

needs_libvirt = pytest.mark.skipif(
    not (shutil.which("libvirtd") and shutil.which("virsh")), reason="no libvirtd, or no virsh"
)
pytestmark = [pytest.mark.vm, needs_libvirt, *needs_qemu]
pytest.importorskip("libvirt", reason="no libvirt for Python")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with leftovers.directory("/var/tmp") as base, virt.host(base) as made:
        yield made


@pytest.fixture(scope="module")
def swapping(host: Host, initrd: Path) -> Iterator[Guest]:
    """One that swaps on the device web by the disk that the documents show."""
    host.tmemctl("create", "web", "--size=192M")
    with virt.guest(host, "web", initrd, DISK, arguments="swap=72", mib=96) as made:
        yield made


@pytest.fixture
def guest(swapping: Guest) -> Guest:
    """The same, running, and as far as it was left by the test before."""
    if not swapping.runs():
        swapping.start()
    swapping.goes_on()
    return swapping


def survives(host: Host, device: str, initrd: Path, machine: str, *elements: str) -> None:
    """Kill the server twice while a guest writes and reads back; no request may fail."""
    with virt.guest(
        host, "other", initrd, *elements, arguments=f"serial={_serial(elements)}", machine=machine
    ) as guest:
        guest.start()
        for _ in range(2):
            guest.goes_on()
            host.kill(device)
            host.tmemctl("start", device)
        guest.goes_on()


def _serial(elements: tuple[str, ...]) -> str:
    """What a disk of theirs says of itself."""
    return "other" if any("vhostuser" in element for element in elements) else "tmem"


@pytest.fixture
def other(host: Host) -> Iterator[str]:
    """A device that has both doors, for a guest of one test."""
    host.tmemctl("create", "other", "--size=64M", "--vhost")
    yield "other"
    host.tmemctl("remove", "--force", "other")


@pytest.mark.parametrize("kind", ["pc qemu:commandline", "q35 qemu:commandline", "q35 disk"])
def test_a_guest_survives_its_server(host: Host, initrd: Path, other: str, kind: str) -> None:
    machine, tag = kind.split()
    element = documented(tag, "/web.sock").replace("/web.sock", "/other.sock").replace("'web'", "'other'")
    survives(host, other, initrd, machine, element.replace("export=web", "export=other"))


def test_a_guest_that_shares_its_memory_survives_its_server(host: Host, initrd: Path, other: str) -> None:
    element = documented("disk", "/web/vhost.sock").replace("/web/", "/other/")
    survives(host, other, initrd, "q35", documented("memoryBacking", "memfd"), element)
    assert host.pool(other)["doors"]["requests"]


def test_a_guest_whose_disk_is_an_overlay_survives_the_server_of_the_image(host: Host, initrd: Path) -> None:
    image = "var/lib/libvirt/images/golden.img"
    (host.base / image).write_bytes(b"".join(compressible(page, 1) for page in range(16384)))
    host.tmemctl("create", "golden", f"--source=/{image}")
    uri = "nbd+unix:///golden?socket=/run/tmemd-devices/golden.sock"
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", uri, "-F", "raw", "/var/lib/libvirt/images/guest1.qcow2")
    element = documented("qemu:commandline", "/golden.sock", "cache-devices.md")
    assert '"drive":"disk"' in element
    survives(host, "golden", initrd, "pc", element.replace('"drive":"disk"', '"drive":"disk","serial":"tmem"'))
    assert host.pool("golden")["gets"]


def test_it_goes_on_when_its_server_is_back_and_when_it_is_started_again(host: Host, guest: Guest) -> None:
    for _ in range(2):
        host.kill("web")
        wait_until(lambda: guest.state() == "paused (I/O error)", "the guest to be paused")
        assert "vdb: unspecified error" in host.virsh("domblkerror", "web")
        host.tmemctl("start", "web")
        wait_until(lambda: guest.state() == "running (unpaused)", "the guest to be resumed")
        guest.goes_on()
    host.restart_libvirtd()
    guest.goes_on()
    host.virsh("suspend", "web")
    host.tmemctl("stop", "web")
    host.tmemctl("start", "web")
    host.virsh("resume", "web")
    guest.goes_on()
    host.virsh("destroy", "web")
    guest.start()
    guest.goes_on()


def test_a_saved_guest_finds_its_pages_after_a_reboot(host: Host, guest: Guest) -> None:
    host.virsh("managedsave", "web")
    host.drained("web")
    host.reboot("web")
    guest.start()
    guest.goes_on()


def test_what_a_shutdown_of_the_host_drains_is_there_afterwards(host: Host, guest: Guest) -> None:
    with host.without_tmemd():
        host.virsh("save", "web", SAVE)
    assert host.pool("web")["pages_in_tmem"]  # the drain that the hook began had nobody to ask
    host.run("tmemd-libvirt", "drain")
    host.reboot("web")
    host.virsh("restore", SAVE)
    guest.goes_on()


def test_a_saved_guest_whose_pages_went_with_the_host_is_not_restored(host: Host, guest: Guest) -> None:
    with host.without_tmemd():
        host.virsh("managedsave", "web")
    host.reboot("web")
    assert "pages were lost with the host" in host.virsh("start", "web", status=1)
    host.virsh("managedsave-remove", "web")
    guest.start()
    guest.goes_on()


def test_a_save_file_is_restored_once_and_only_the_newest(host: Host, guest: Guest) -> None:
    newer = f"{SAVE}.newer"
    host.virsh("save", "web", SAVE)
    host.virsh("restore", SAVE)
    guest.goes_on()
    wait_until(lambda: NAMESPACE in host.virsh("dumpxml", "web"), "the run to have a name")
    host.virsh("save", "web", newer)
    assert RUN_SINCE in host.virsh("restore", SAVE, status=1)
    host.virsh("restore", newer)
    guest.goes_on()
    host.virsh("destroy", "web")
    assert RUN_SINCE in host.virsh("restore", newer, status=1)


def test_a_snapshot_of_memory_is_not_restored_when_the_guest_has_gone_on(host: Host, guest: Guest) -> None:
    memory = f"{SAVE}.memory"
    snapshot = ["--memspec", f"file={memory},snapshot=external", "--diskspec", "vdb,snapshot=no"]
    host.virsh("snapshot-create-as", "web", "before", *snapshot)
    guest.goes_on()
    host.virsh("destroy", "web")
    host.virsh("snapshot-delete", "web", "before", "--metadata")
    assert RUN_SINCE in host.virsh("restore", memory, status=1)


def test_a_device_is_plugged_in_and_out_while_the_guest_runs(host: Host, initrd: Path) -> None:
    host.tmemctl("create", "plug", "--size=192M")
    disk = host.base / "disk.xml"
    disk.write_text(DISK.replace("/web.sock", "/plug.sock").replace("'web'", "'plug'"))
    with virt.guest(host, "plug", initrd, arguments="swap=72 rounds=1", mib=96) as guest:
        guest.start()
        host.virsh("attach-device", "plug", disk)
        guest.says("guest: swaps no more")
        assert host.pool("plug")["trims"]
        host.virsh("detach-device", "plug", disk)
        guest.says("guest: its disk is gone")
        host.virsh("attach-device", "plug", disk)
        guest.goes_on()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that hosts reach, in which a disk is served to all of them."""
    with leftovers.directory("/var/tmp") as path:
        with (path / "disk").open("wb") as disk:
            disk.truncate(200 << 20)
        path.chmod(0o755)
        with Remote(path, ["file", str(path / "disk")]).start() as server:
            server.socket.chmod(0o666)
            yield path


@pytest.fixture
def other_host() -> Iterator[Host]:
    with leftovers.directory("/var/tmp") as base, virt.host(base) as made:
        yield made


def migrate(here: Host, there: Host, shared: Path, status: int = 0) -> str:
    """As the documents have it, but with the guest stopped: TCG loses what it writes meanwhile, disk or no disk."""
    here.tmemctl("handover", "moving")
    (shared / "moving.hot").write_text(here.tmemctl("hot", "moving"))
    return here.virsh("migrate", "moving", there.uri, f"--migrateuri=unix://{shared}/migrate.sock", status=status)


def test_a_guest_migrates_and_comes_back(host: Host, other_host: Host, initrd: Path, shared: Path) -> None:
    backing = f"--backing=nbd+unix:///?socket={shared}/remote.sock"
    options = ["-ostandby=yes", "-olease=12", "-otimeout=4", f"-owarm={shared}/moving.hot"]
    host.tmemctl("create", "moving", "--size=192M", backing, *options)
    disk = DISK.replace("/web.sock", "/moving.sock").replace("'web'", "'moving'")
    with virt.guest(host, "moving", initrd, disk, arguments="swap=72", mib=96) as guest:
        guest.start()
        guest.goes_on()
        assert "no device moving is defined" in migrate(host, other_host, shared, status=1)
        guest.goes_on()
        other_host.tmemctl("create", "moving", "--size=192M", backing, *options)
        for here, there in ((host, other_host), (other_host, host)):
            migrate(here, there, shared)
            guest.goes_on(4)
            now = there.pool("moving")
            assert now["prefetches"]
            assert (now["pages_lost"], now["bad_checksums"], now["io_errors"]) == (0, 0, 0)
            here.tmemctl("restart", "moving")  # it stands by for the way back
    host.tmemctl("remove", "--force", "moving")


def test_a_guest_whose_device_cannot_be_had_is_not_started(host: Host, initrd: Path) -> None:
    with virt.guest(host, "lost", initrd, DISK.replace("/web.sock", "/nowhere.sock")):
        said = host.virsh("start", "lost", status=1)
    assert "tmemctl: no device nowhere is defined" in said
