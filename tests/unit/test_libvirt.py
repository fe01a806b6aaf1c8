# SPDX-License-Identifier: BSD-3-Clause
"""libvirt's hook and the watch over paused guests, on XML that a real libvirt 9.0 gave, and without one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import fakes
from tests.support.harness import ROOT, environment
from tmemd.libvirt import devices, program
from tmemd.libvirt.devices import DeviceError
from tmemd.libvirt.domain import MOST_XML, NAMESPACE, Domain, DomainError, parse
from tmemd.libvirt.hook import Hook, logged_reason
from tmemd.libvirt.records import Record, Records
from tmemd.protocol import PoolStatus

DATA = ROOT / "tests/unit/data/libvirt"
UUID = parse((DATA / "nbd.xml").read_bytes()).uuid
WEB = Domain(UUID, frozenset({"web"}))
ENTITIES = b'<!DOCTYPE domain [<!ENTITY a "/run/tmemd-devices/"><!ENTITY b "&a;&a;">]><domain><uuid>&b;</uuid></domain>'


def disk(socket: str) -> bytes:
    """A domain with a disk there."""
    return f"<domain><devices><disk><source><host socket='{socket}'/></source></disk></devices></domain>".encode()


@pytest.mark.parametrize(
    ("name", "found", "disks"),
    [
        ("nbd", {"web"}, {"vdb": {"web"}}),
        ("vhost", {"web"}, {"vdb": {"web"}}),
        ("commandline", {"web"}, {}),
        ("overlay", {"web", "golden"}, {"vda": {"golden"}, "vdb": {"web"}}),
        ("none", set(), {}),
    ],
)
def test_devices_are_found(name: str, found: set[str], disks: dict[str, set[str]]) -> None:
    domain = parse((DATA / f"{name}.xml").read_bytes())
    assert domain.devices == found
    assert domain.disks == {target: frozenset(devices) for target, devices in disks.items()}
    assert len(domain.uuid) == 36


@pytest.mark.parametrize(
    "xml",
    [
        disk("/run/tmemd-devices/../x.sock"),
        disk("/run/tmemd-devices/-rf.sock"),
        disk("/run/tmemd-devices/a b.sock"),
        disk("/run/tmemd-devices/web.sock.old"),
        disk("/run/tmemd-devices/" + "a" * 26 + ".sock"),
        disk("/mnt/run/tmemd-devices/web.sock"),
        b"<domain><metadata><x a='/run/tmemd-devices/web.sock'/></metadata><devices/></domain>",
        b"<domain><description>/run/tmemd-devices/web.sock</description></domain>",
    ],
)
def test_what_only_looks_like_a_device_is_none(xml: bytes) -> None:
    assert parse(xml).devices == set()


@pytest.mark.parametrize(
    "xml",
    [b"", b"web", b"<domain>", b"<domain/><domain/>", b"\xff\xfe\x00", ENTITIES, b"<d>" * (MOST_XML // 3 + 1)],
    ids=range(7),
)
def test_hostile_xml_is_refused(xml: bytes) -> None:
    with pytest.raises(DomainError):
        parse(xml)


def test_xml_as_deep_as_it_may_be_is_read() -> None:
    deep = MOST_XML // 8
    assert parse(b"<d>" * deep + b"</d>" * deep) == Domain()


def pool_status(lost: int = 0, kind: str = "persistent") -> PoolStatus:
    return PoolStatus(
        name="web", path="", uid=0, size=0, has_file=True, backing="", target_bytes=0, frozen=False, served=True,
        error=None, counters=fakes.counters(pages_lost=lost), kind=kind,  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass
class Around:
    """What the hook works on, and what it did."""

    directory: Path
    status: PoolStatus | None = field(default_factory=pool_status)
    fails: bool = False
    did: list[str] = field(default_factory=list)

    def start(self, device: str) -> None:
        if self.fails:
            raise DeviceError(f"{device}: no")
        self.did.append(f"start {device}")

    def run(self, operation: str, reason: str = "-", domain: Domain = WEB) -> list[str]:
        """Have the hook do that; returns what it did, and forgets it."""
        records = Records(self.directory / "records")
        hook = Hook(records, self.start, lambda _: self.status, lambda: self.did.append("drain"), self.directory)
        hook.run("web", operation, reason, domain)
        did, self.did = self.did, []
        return did

    def record(self) -> Record | None:
        return Records(self.directory / "records").read("web")

    def log(self, *lines: str) -> None:
        text = "".join(f"2026-11-26 06:43:20.287+0000: {line}\n" for line in lines)
        (self.directory / "web.log").write_text(text)


@pytest.fixture
def around(tmp_path: Path) -> Around:
    return Around(tmp_path)


def test_a_device_is_started_before_its_guest(around: Around) -> None:
    assert around.run("prepare", domain=Domain(UUID, frozenset({"web", "golden"}))) == ["start golden", "start web"]
    around.fails = True
    with pytest.raises(DeviceError):
        around.run("prepare")


@pytest.mark.parametrize("operation", ["start", "stopped", "migrate", "reconnect", "attach", "what comes later"])
def test_at_other_moments_nothing_is_done(around: Around, operation: str) -> None:
    around.fails = True
    assert (around.run(operation), around.record()) == ([], None)


@pytest.mark.parametrize(
    ("reason", "guest", "did"),
    [
        ("saved", "saved", ["drain"]),
        ("unknown", "unknown", ["drain"]),
        ("daemon", "unknown", ["drain"]),
        ("destroyed", "ended", []),
        ("shutdown", "ended", []),
        ("crashed", "ended", []),
        ("migrated", "ended", []),
        ("from snapshot", "ended", []),
    ],
)
@pytest.mark.parametrize("told", [True, False], ids=["told", "from the log"])
def test_why_a_guest_ended_says_what_is_kept(
    around: Around, reason: str, guest: str, did: list[str], told: bool
) -> None:
    around.log("starting up libvirt version: 9.0.0", f"shutting down, reason={reason}")
    around.run("started")
    assert around.record() == Record(UUID, "running")
    assert around.run("release", reason if told else "-") == did
    assert around.record() == Record(UUID, guest)  # type: ignore[arg-type]


def test_a_guest_that_failed_to_start_leaves_things_as_they_were(around: Around) -> None:
    around.run("release", "saved")
    assert around.run("release", "failed") == []
    assert around.record() == Record(UUID, "saved")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "unknown"),
        ("QEMU says: shutting down, reason=saved\n", "unknown"),
        ("2026-11-26 06:43:20.287+0000: shutting down, reason=saved\n" + "x" * 9999 + "\n", "saved"),
        ("2026-11-26 06:43:20.287+0000: shutting down, reason=saved\n" + "x" * 99999 + "\n", "unknown"),
        (
            "2026-11-26 06:43:20.287+0000: shutting down, reason=saved\n2026-11-26 1+0000: starting up libvirt",
            "unknown",
        ),
        (
            "2026-11-26 1+0000: shutting down, reason=saved\n2026-11-26 1+0000: shutting down, reason=crashed\n",
            "crashed",
        ),
    ],
)
def test_the_log_tells_why(tmp_path: Path, log: str, reason: str) -> None:
    assert logged_reason(tmp_path, "web") == "unknown"
    (tmp_path / "web.log").write_text(log)
    assert logged_reason(tmp_path, "web") == reason


def test_a_saved_guest_is_restored_once(around: Around) -> None:
    around.run("started")
    around.run("release", "saved")
    assert around.run("restore") == ["start web"]
    assert around.run("restore") == ["start web"]  # the first try failed before the guest ran
    around.run("started")
    with pytest.raises(DeviceError, match="its guest has run since"):
        around.run("restore")
    around.run("release", "destroyed")
    with pytest.raises(DeviceError, match=r"its guest has run since.*remove .*/web\.json"):
        around.run("restore")


def test_a_saved_guest_is_not_restored_when_another_used_its_device(around: Around) -> None:
    around.run("started", domain=Domain("another", frozenset({"web"})))
    around.run("release", "saved", domain=Domain("another", frozenset({"web"})))
    with pytest.raises(DeviceError, match="domain another has used it since"):
        around.run("restore")


def test_a_saved_guest_is_not_restored_when_pages_were_lost_since(around: Around) -> None:
    around.status = pool_status(lost=5)
    around.run("release", "saved")
    around.run("restore")
    around.status = pool_status(lost=7)
    with pytest.raises(DeviceError, match="2 of its pages were lost with the host"):
        around.run("restore")


def test_who_knows_nothing_refuses_nothing(around: Around) -> None:
    assert around.run("restore") == ["start web"]
    around.run("release", "unknown")
    around.status = None
    assert around.run("restore") == ["start web"]


def test_a_save_file_is_not_restored_when_there_is_a_newer_one(around: Around) -> None:
    unnamed, older, newer = (Domain(UUID, WEB.devices, run=run) for run in ("", "1", "2"))
    around.run("started", domain=older)
    around.run("release", "saved", domain=newer)  # it was given its name while it ran
    for file in (unnamed, older):
        with pytest.raises(DeviceError, match="its guest has run since, and was saved again"):
            around.run("restore", domain=file)
    around.run("restore", domain=newer)
    around.run("release", "saved", domain=unnamed)
    for file in (unnamed, older, newer):  # there is no telling
        around.run("restore", domain=file)


def test_a_damaged_record_refuses(around: Around) -> None:
    around.run("started")
    Records(around.directory / "records").path("web").write_text('{"guest": "saved"')
    with pytest.raises(DeviceError, match=r"web\.json.*remove it"):
        around.run("restore")
    assert Records(around.directory / "records").kept() == ["web"]


def test_a_cache_device_is_everybodys(around: Around) -> None:
    around.status = pool_status(kind="ephemeral")
    around.run("started")
    assert around.record() is None
    assert around.run("restore") == ["start web"]


def test_records_are_the_owners_alone_and_say_who_is_kept(tmp_path: Path) -> None:
    records = Records(tmp_path / "records")
    assert records.kept() == []
    for device, guest in (("a", "running"), ("b", "saved"), ("c", "ended"), ("d", "unknown")):
        records.write(device, Record(UUID, guest))  # type: ignore[arg-type]
    assert records.kept() == ["b", "d"]
    assert (records.path("a").stat().st_mode & 0o777, (tmp_path / "records").stat().st_mode & 0o777) == (0o600, 0o700)


def run_script(operation: str, xml: bytes, path: str) -> subprocess.CompletedProcess[str]:
    """The script that libvirt runs, with that PATH behind it."""
    command = [str(ROOT / "scripts/libvirt/tmemd"), "web", operation, "begin", "-"]
    done = subprocess.run(command, input=xml, capture_output=True, env={"PATH": path}, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def programs(tmp_path: Path) -> str:
    """A PATH on which tmemd-libvirt says what it was given, and fails."""
    script = tmp_path / "tmemd-libvirt"
    script.write_text('#!/bin/sh\necho "$@" >&2; cat >&2; exit 1\n')
    script.chmod(0o755)
    return f"{tmp_path}:/usr/bin:/bin"


def test_the_script_asks_only_for_domains_with_our_devices(programs: str) -> None:
    for name in ("none", "nbd"):
        xml = (DATA / f"{name}.xml").read_bytes()
        done = run_script("prepare", xml, programs)
        assert done.returncode == (name == "nbd")
        assert done.stderr == ("" if name == "none" else f"hook web prepare begin -\n{xml.decode()}")


def test_the_script_lets_all_start_once_tmemd_is_removed() -> None:
    assert run_script("prepare", (DATA / "nbd.xml").read_bytes(), "/usr/bin:/bin").returncode == 0


@pytest.mark.parametrize(
    ("operation", "status"),
    [("prepare", 1), ("restore", 1), ("reconnect", 0), ("started", 0), ("release", 0), ("start", 0)],
)
def test_only_what_may_stop_a_guest_fails(operation: str, status: int) -> None:
    command = [sys.executable, "-m", "tmemd.libvirt", "hook", "web", operation, "begin", "-"]
    done = subprocess.run(command, input=ENTITIES, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (status, b"")
    assert b"the domain's XML has a document type" in done.stderr


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    """Serves the socket of the device web: each client is sent what was said last, and no more."""
    said = [b""]
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "web.sock"))
        listening.listen()

        def serve() -> None:
            with suppress(OSError):  # the listener is shut down
                while True:
                    client, _ = listening.accept()
                    with client:
                        client.sendall(said[0])

        threading.Thread(target=serve, daemon=True).start()
        yield lambda words: said.__setitem__(0, words)
        listening.shutdown(socket.SHUT_RDWR)


def test_who_is_served_is_greeted(tmp_path: Path, listener: Callable[[bytes], None]) -> None:
    for words, served in ((b"", False), (b"NBDMAG", False), (b"SSH-2.0-", False), (b"NBDMAGICIHAVEOPT", True)):
        listener(words)
        assert devices.is_served("web", 10, tmp_path) is served
    assert not devices.is_served("db", 10, tmp_path)


@pytest.mark.parametrize("status", [0, 1])
def test_what_is_served_by_hand_is_not_started(
    tmp_path: Path, listener: Callable[[bytes], None], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    script = tmp_path / "tmemctl"
    script.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked; echo no such device >&2; exit {status}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    listener(b"NBDMAGICIHAVEOPT")
    devices.start("web", tmp_path)
    assert (tmp_path / "asked").read_text() == "start -- web\n"
    if status:
        with pytest.raises(DeviceError, match="no such device"):
            devices.start("db", tmp_path)


def test_drain_is_of_what_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = Records(tmp_path / "records")
    with fakes.on_tmpfs() as base, fakes.tmemd(base) as tmemd, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMEMD_SOCKET", str(tmemd.socket))
        patch.setenv("PATH", environment()["PATH"])
        assert program.main(["--records", str(tmp_path / "records"), "drain"]) == 0
        records.write("web", Record(UUID, "saved"))
        records.write("db", Record(UUID, "ended"))
        assert program.main(["--records", str(tmp_path / "records"), "drain"]) == 1
    assert capfd.readouterr().err.startswith("tmemctl: there is no pool web")


libvirt = pytest.importorskip("libvirt", reason="no libvirt for Python")


@dataclass
class FakeDomain:
    """A domain as libvirt's module has it."""

    errors: list[str]
    xml: str = "overlay"
    reason: int = libvirt.VIR_DOMAIN_PAUSED_IOERROR
    resumed: int = 0
    id: int = 1
    run: str = ""
    is_named: str = "web"

    def ID(self) -> int:  # noqa: N802
        return self.id

    def setMetadata(self, type: int, metadata: str, key: str, uri: str, flags: int) -> int:  # noqa: A002, N802
        expected = (libvirt.VIR_DOMAIN_METADATA_ELEMENT, "tmemd", NAMESPACE, libvirt.VIR_DOMAIN_AFFECT_LIVE)
        assert (type, key, uri, flags) == expected
        if self.run == "busy":
            raise libvirt.libvirtError("busy")
        self.run = metadata
        return 0

    def name(self) -> str:
        return self.is_named

    def state(self) -> list[int]:
        return [libvirt.VIR_DOMAIN_PAUSED, self.reason]

    def diskErrors(self) -> dict[str, int]:  # noqa: N802
        return dict.fromkeys(self.errors, libvirt.VIR_DOMAIN_DISK_ERROR_UNSPEC)

    def XMLDesc(self) -> str:  # noqa: N802
        if self.xml == "missing":
            raise libvirt.libvirtError("missing")
        return (DATA / f"{self.xml}.xml").read_text()

    def resume(self) -> int:
        self.resumed += 1
        return 0


@dataclass
class Watching:
    """A watch whose time passes as a test says, and whose devices are served or not."""

    served: set[str] = field(default_factory=lambda: {"web", "golden"})
    now: float = 1000.0
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from tmemd.libvirt.watch import Watch

        self.watch = Watch(lambda device, _: device in self.served, self.said.append, lambda: self.now)

    def resumes(self, domain: FakeDomain) -> bool:
        before = domain.resumed
        self.watch.look([domain])
        return domain.resumed > before


@pytest.mark.parametrize(
    ("domain", "resumed"),
    [
        (FakeDomain(["vdb"]), True),
        (FakeDomain(["vda", "vdb"]), True),
        (FakeDomain(["vda", "sda"]), False),  # a disk that is not ours
        (FakeDomain([]), False),
        (FakeDomain(["vdb"], reason=libvirt.VIR_DOMAIN_PAUSED_USER), False),
        (FakeDomain(["vda"], xml="none"), False),
    ],
)
def test_a_guest_is_resumed_when_the_error_was_ours(domain: FakeDomain, resumed: bool) -> None:
    assert Watching().resumes(domain) is resumed


def test_a_guest_is_resumed_when_its_device_is_served_again() -> None:
    watching, domain = Watching(served=set()), FakeDomain(["vda", "vdb"])
    assert not watching.resumes(domain)
    watching.served = {"web"}
    assert not watching.resumes(domain)
    watching.served = {"web", "golden"}
    assert watching.resumes(domain)


def test_a_guest_that_pauses_again_and_again_is_resumed_ever_more_seldom() -> None:
    watching, domain = Watching(), FakeDomain(["vdb"])
    times = []
    for _ in range(400):
        watching.now += 1
        if watching.resumes(domain):
            times.append(watching.now - 1000)
    assert times[:8] == [1, 2, 4, 8, 16, 32, 64, 124]
    watching.now += 500
    assert watching.resumes(domain)
    watching.now += 1
    assert watching.resumes(domain)


def test_each_run_of_a_guest_has_a_name() -> None:
    watching, domain, busy, other = Watching(), FakeDomain([]), FakeDomain([], run="busy"), FakeDomain([], xml="none")
    busy.id, other.id = 7, 8
    names = []
    for number in (1, 1, 2):
        domain.id = number
        watching.watch.name_runs([busy, domain, other])
        names.append(domain.run)
    assert len(set(names)) == 2
    assert (busy.run, other.run, watching.said) == ("busy", "", ["web: busy"])


def test_what_is_wrong_with_one_guest_keeps_no_other_from_going_on() -> None:
    watching, broken, domain = Watching(), FakeDomain(["vdb"], xml="missing"), FakeDomain(["vdb"])
    broken.is_named = "broken"
    watching.watch.look([broken, domain])
    assert (domain.resumed, watching.said[0]) == (1, "broken: missing")


def test_the_name_of_a_run_is_found_in_the_metadata() -> None:
    element = f"<metadata><t:run xmlns:t='{NAMESPACE}' id='1'/><run id='2'/></metadata>"
    assert parse(f"<domain>{element}<devices/></domain>".encode()).run == "1"
    assert parse(f"<domain><devices>{element}</devices></domain>".encode()).run == ""
