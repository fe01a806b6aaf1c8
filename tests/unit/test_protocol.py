# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest

from tests.support import fakes
from tmemd import protocol
from tmemd.store.poolfile import PoolError, check_name

REQUESTS = [
    protocol.Attach("web", 1 << 30, True, 1 << 20),
    protocol.Attach("web", 1 << 30, False, None),
    protocol.List(),
    protocol.Show("web"),
    protocol.Set(name="web", target=0),
    protocol.Set(name="web", target=None, weight=200, cap=None, minimum=0, compression=False),
    protocol.Set(name="web", forget=frozenset({"weight", "cap", "minimum", "compression"})),
    protocol.Freeze("web", True),
    protocol.Freeze(None, True),
    protocol.Host(),
    protocol.Ask("web", "demote", 4096, 15, True),
    protocol.Ask("web", "demote", 4096),
    protocol.Destroy("web", True),
]

HOSTILE = [
    b"",
    b"\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b'{"type":"list"\n',
    b'{"type":"reboot"}\n',
    b'{"type":7}\n',
    b'{"type":"list","more":1}\n',
    b'{"type":"show"}\n',
    b'{"type":"show","name":7}\n',
    b'{"type":"show","name":"\xff"}\n',
    b'{"type":"set","name":"web","target":-1}\n',
    b'{"type":"set","name":"web","target":1e30}\n',
    b'{"type":"set","name":"web","target":9223372036854775808}\n',
    b'{"type":"set","name":"web","target":"1"}\n',
    b'{"type":"set","name":"web","colour":"red"}\n',
    b'{"type":"set","name":"web","weight":0}\n',
    b'{"type":"set","name":"web","weight":null}\n',
    b'{"type":"set","name":"web","compression":1}\n',
    b'{"type":"set","name":"web","forget":["target"]}\n',
    b'{"type":"set","name":null,"weight":5}\n',
    b'{"type":"freeze","name":"*","frozen":true}\n',
    b'{"type":"freeze","frozen":true}\n',
    b'{"type":"ask","name":"web","work":"demote","min_age":16}\n',
    b'{"type":"ask","name":"web","work":"NONE"}\n',
    b'{"type":"attach","name":"web","size":0,"has_file":true}\n',
    b'{"type":"attach","name":"web","size":4096,"has_file":1}\n',
    b"[" * 4000 + b"\n",
    b'{"type":"freeze","name":"web","frozen":false,"frozen":true}\n',
    b'{"type":"show","type":"show","name":"web"}\n',
]

BAD_NAMES = ["", ".", "..", "../web", "a/b", "-web", ".web", "web\n", "w\0b", "wéb", "a" * 64, "a b", "_web"]


@pytest.mark.parametrize("request_", REQUESTS)
def test_requests_survive_the_wire(request_: protocol.Request) -> None:
    line = protocol.encode(request_)
    assert line.count(b"\n") == 1
    assert len(line) < protocol.MAX_REQUEST
    assert protocol.decode_request(line) == request_


@pytest.mark.parametrize("line", HOSTILE)
def test_what_is_no_request_is_refused(line: bytes) -> None:
    with pytest.raises(protocol.ProtocolError):
        protocol.decode_request(line)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_on_both_sides(name: str) -> None:
    with pytest.raises(PoolError):
        check_name(name)
    with pytest.raises(protocol.ProtocolError):
        protocol.decode_request(protocol.encode(protocol.Show(name)))


@pytest.mark.parametrize("name", ["a", "0", "web-1.example_2", "a" * 63])
def test_good_names_are_accepted(name: str) -> None:
    assert check_name(name) == name
    assert protocol.decode_request(protocol.encode(protocol.Show(name))) == protocol.Show(name)


def test_a_status_prints_flat_with_the_names_scripts_rely_on() -> None:
    status = protocol.PoolStatus(
        name="web", path="/p/web.pool", uid=0, size=4096, has_file=True, backing="/b", target_bytes=7, frozen=False,
        served=False, error=None, counters=fakes.counters(used_bytes=3, pid=99),
    )  # fmt: skip
    answer = protocol.decode_answer(protocol.encode(protocol.Listed([status])))
    assert answer == protocol.Listed([status])
    flat = status.flat()
    fixed = "name size target_bytes used_bytes pages_in_tmem pages_in_file puts puts_refused gets invalidates"
    assert set(fixed.split()) <= set(flat)
    assert (flat["used_bytes"], flat["pid"], flat["frozen"]) == (3, None, False)
