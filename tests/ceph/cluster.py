# SPDX-License-Identifier: BSD-3-Clause
"""A Ceph of one monitor and one OSD on this machine, and RBD images of it as qemu-nbd serves them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any, Final

from tests.support.harness import MIB, wait_until
from tests.support.leftovers import dying_with_us

POOL: Final = "rbd"
USER: Final = "tmemd"
PLACEMENT_GROUPS: Final = 8
OBJECT: Final = 4 * MIB  # of an image's data each is so much
OSD_BYTES: Final = 4096 * MIB  # a sparse file

# One copy of each object, in one OSD, whose cache is small; nothing outside the directory and the loopback device.
CONFIGURATION: Final = """\
[global]
fsid = {fsid}
mon_host = v2:127.0.0.1:{port}
public_addr = 127.0.0.1
ms_bind_msgr1 = false
keyring = {base}/keyring
run_dir = {base}
admin_socket = {base}/$name.$pid.asok
crash_dir = {base}
pid_file = {base}/$name.pid
log_file = {base}/$name.log
mon_data = {base}/mon
osd_data = {base}/osd
mon_allow_pool_size_one = true
osd_pool_default_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
bluestore_block_create = true
bluestore_block_size = {osd_bytes}
bluestore_cache_autotune = false
bluestore_cache_size = {cache_bytes}
osd_client_watch_timeout = 10
"""


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """The monitor `mon.a` and the OSD `osd.0`, each of which may be killed and started again."""

    def __init__(self, base: Path) -> None:
        """Have everything below *base*, a directory on disk."""
        self.configuration = base / "ceph.conf"
        self._base, self._fsid = base, str(uuid.uuid4())
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.configuration.write_text(
            CONFIGURATION.format(
                fsid=self._fsid, port=free_port(), base=base, osd_bytes=OSD_BYTES, cache_bytes=64 * MIB
            )
        )

    def run(self, *command: str | Path) -> str:
        """What one of Ceph's commands prints. AssertionError with what it complained of."""
        environment = os.environ | {"CEPH_CONF": str(self.configuration)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
        return done.stdout

    def ask(self, *command: str) -> Any:
        """The same for commands that answer in JSON."""
        return json.loads(self.run(*command, "--format", "json"))

    def make(self) -> None:
        """Make a cluster with a pool for images and a user who may use it; its daemons run."""
        self._make_keys()
        self._make_monitor()
        self._make_osd()
        self.run("ceph", "osd", "pool", "create", POOL, str(PLACEMENT_GROUPS))
        self.run("rbd", "pool", "init", POOL)
        grants = "mon", "profile rbd", "osd", f"profile rbd pool={POOL}"
        self.run("ceph", "auth", "get-or-create", f"client.{USER}", *grants, "-o", self._base / "user")
        self.run("ceph-authtool", self._base / "keyring", "--import-keyring", self._base / "user")

    def _make_keys(self) -> None:
        keyring = self._base / "keyring"
        self.run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        everything = "--cap", "mon", "allow *", "--cap", "osd", "allow *"
        self.run("ceph-authtool", keyring, "--gen-key", "-n", "client.admin", *everything)
        grants = "--cap", "mon", "allow profile osd", "--cap", "osd", "allow *"
        self.run("ceph-authtool", keyring, "--gen-key", "-n", "osd.0", *grants)

    def _make_monitor(self) -> None:
        (self._base / "mon").mkdir()
        map_ = self._base / "monmap"
        host = self.run("ceph-conf", "--lookup", "mon_host").strip()
        self.run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", f"[{host}]", map_)
        self.run("ceph-mon", "-i", "a", "--mkfs", "--monmap", map_, "--keyring", self._base / "keyring")
        self.start("mon.a")
        self.run("ceph", "--connect-timeout", "60", "-s")

    def _make_osd(self) -> None:
        (self._base / "osd").mkdir()
        name = str(uuid.uuid4())
        self.run("ceph", "osd", "new", name)
        self.run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", name)
        self.start("osd.0")

    def start(self, daemon: str) -> None:
        """Start `mon.a` or `osd.0`."""
        kind, number = daemon.split(".")
        command = dying_with_us([f"ceph-{kind}", "-c", self.configuration, "-i", number, "-f"])
        with (self._base / f"{daemon}.err").open("ab") as log:
            self._daemons[daemon] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, daemon: str) -> None:
        """SIGKILL."""
        self._daemons[daemon].kill()
        self._daemons[daemon].wait()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in self._daemons:
            self.kill(daemon)

    def create(self, image: str, nbytes: int) -> None:
        """Make an RBD image of whole mebibytes."""
        self.run("rbd", "create", "--size", f"{nbytes // MIB}M", f"{POOL}/{image}")

    def remove(self, image: str) -> None:
        """Remove one; nobody has it open."""
        self.run("rbd", "remove", "--no-progress", f"{POOL}/{image}")

    def owner(self, image: str) -> str:
        """The address of the one client that holds an image's exclusive lock; nothing when none does."""
        locks = self.ask("rbd", "lock", "ls", f"{POOL}/{image}")
        return str(locks[0]["address"]) if locks else ""

    def waiting(self, client: str) -> list[int]:
        """What of an image's data a client waits for, `client.USER.PID`: the offsets of objects."""
        requests = self.ask("ceph", "daemon", f"{self._base}/{client}.asok", "objecter_requests")["ops"]
        objects = (request["object_id"].rpartition(".") for request in requests)
        return [int(number, 16) * OBJECT for kind, _, number in objects if kind.startswith("rbd_data.")]

    def blocklist(self, client: str) -> None:
        """From now on a client's requests fail, those that are under way included."""
        self.run("ceph", "osd", "blocklist", "add", client)

    def blocklisted(self) -> set[str]:
        """The addresses of clients whose requests fail."""
        return set(self.ask("ceph", "osd", "dump")["blocklist"])


class Export:
    """An RBD image as qemu-nbd serves it; started by `start`, and ended by `kill`."""

    def __init__(self, cluster: Cluster, image: str, socket: Path) -> None:
        """Serve *image* on *socket*."""
        self.socket = socket
        self.uri = f"nbd+unix:///{image}?socket={socket}"
        self._cluster = cluster
        options = {"pool": POOL, "image": image, "user": USER, "conf": cluster.configuration}
        node = ",".join(["driver=raw", "file.driver=rbd", *(f"file.{key}={value}" for key, value in options.items())])
        # Without cache=none librbd holds back what it has acknowledged, which goes when qemu-nbd is killed.
        self._command = ["qemu-nbd", "--persistent", "--shared=16", "--cache=none", "--discard=unmap"]
        self._pidfile = socket.with_suffix(".pid")  # made when it listens
        self._command += [f"--export-name={image}", f"--socket={socket}", f"--pid-file={self._pidfile}"]
        self._command += ["--image-opts", node]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Export:
        """Start and wait until it listens."""
        for left_over in (self.socket, self._pidfile):
            left_over.unlink(missing_ok=True)
        process = self._process = subprocess.Popen(dying_with_us(self._command))
        wait_until(lambda: process.poll() is not None or self._pidfile.exists(), "qemu-nbd to listen")
        assert process.poll() is None, "qemu-nbd ended at its start"
        return self

    def waiting(self) -> list[int]:
        """Where in the image it waits for an OSD: the offsets of objects."""
        assert self._process is not None
        return self._cluster.waiting(f"client.{USER}.{self._process.pid}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; no harm when it is gone already."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
