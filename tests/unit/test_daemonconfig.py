# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.support.harness import ROOT
from tmemd import daemonconfig
from tmemd.daemonconfig import Address, Amount, ConfigFileError, DaemonConfig, PoolConfig, load_config, parse_config

EXAMPLE = ROOT / "scripts/tmemd.toml.example"
GIB = 1 << 30


def test_the_example_says_the_defaults() -> None:
    assert load_config(EXAMPLE) == DaemonConfig() == parse_config("")


def test_the_example_shows_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    # Commented keys have no blank behind their '#', comments do.
    everything = "\n".join(line[1:] if line.startswith("#") and line[1:2].isalpha() | (line[1:2] == "[") else line
                           for line in lines)  # fmt: skip
    found = parse_config(everything)
    (pool,) = found.pools.values()
    assert pool == PoolConfig(
        weight=200, cap=daemonconfig.Size(4 * GIB), minimum=daemonconfig.Size(GIB // 4), compression=True
    )
    assert found.demotion.writes_per_hour == 20 * GIB
    assert found.metrics.listen == "127.0.0.1:9632"
    assert (found.access.group, found.access.allow_groups, found.tmpfs.size) == ("tmemd", ("tmemd",), "50%")
    for table in (found, found.access, found.tmpfs, found.budget, found.demotion, found.metrics, pool):
        for key in table.__struct_fields__:
            assert f"{key} =" in everything or f"[{key}" in everything, f"{key} is not in the example"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("x =", "Invalid value"),
        ('polcy = "fair"', "polcy: there is no such key; known are policy, .*; did you mean 'policy'\\?"),
        ("policy = 3", "policy: Expected `str`, got `int`"),
        ('policy = "best"', "policy: 'best' is no policy: there are fair, "),
        ("pools_per_user = -1", "pools_per_user: Expected `int` >= 0"),
        ("budget = 3", "budget: Expected a table, got `int`"),
        ("pools = 3", r"pools: expected tables, \[pools.NAME\]"),
        ("[budget]\nmaximun = 1", "budget.maximun: there is no such key; known are minimum, maximum, .*'maximum'"),
        ('[acces]\ngroup = "x"', "acces: there is no such key; known are .*; did you mean 'access'"),
        ("[access]\ngroup = true", "access.group: Expected `int | str`, got `bool`"),
        ("[access]\nallow_users = [-1]", r"access.allow_users\[0\]: Expected `int` >= 0"),
        ('[tmpfs]\nsize = "0"', "tmpfs.size: a size of 0 would let the tmpfs take all RAM"),
        ('[tmpfs]\nsize = "much"', "tmpfs.size: 'much' is not a size"),
        ('[budget]\nmaximum = "101%"', "budget.maximum: '101%' is not 0% to 100%"),
        ('[budget]\nmaximum = "9q"', "budget.maximum: '9q' is not a size: .* or a share of the host's RAM"),
        ("[budget]\nreserve = true", "budget.reserve: expected a size"),
        ("[budget]\nreserve = -1", "budget.reserve: '-1' is not a size"),
        ("[budget]\npressure = nan", "budget.pressure: Expected `float` >= 0"),
        ("[budget]\npressure = 101", "budget.pressure: Expected `float` <= 100"),
        ('[demotion]\nwrites_per_hour = "5%"', "demotion.writes_per_hour: '5%' is not a size"),
        ('[metrics]\nlisten = "localhost"', "metrics.listen: 'localhost' is not HOST:PORT"),
        ('[metrics]\nlisten = "localhost:65536"', "metrics.listen: 'localhost:65536' is not HOST:PORT"),
        ("[pools.web]\nweight = 0", "pools.web.weight: Expected `int` >= 1"),
        ("[pools.web]\nweight = 10001", "pools.web.weight: Expected `int` <= 10000"),
        ("[pools.web]\ncompression = 1", "pools.web.compression: Expected `bool`, got `int`"),
        ("[pools.web]\ntarget = 1", "pools.web.target: there is no such key"),
        ('[pools.web]\ncap = "1M"\nminimum = "2M"', "pools.web.cap: 1.00M is below its minimum, 2.00M"),
        ('[pools."../web"]', r"pools.'../web': a name is 1 to 63"),
    ],
)
def test_what_is_wrong_names_file_and_key_and_what_is_allowed(tmp_path: Path, text: str, error: str) -> None:
    path = tmp_path / "tmemd.toml"
    path.write_text(text)
    with pytest.raises(ConfigFileError, match=f"^{path}: {error}"):
        load_config(path)


def test_files_that_cannot_be_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="nothing: No such file"):
        load_config(tmp_path / "nothing")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigFileError, match="binary: 'utf-8' codec"):
        load_config(binary)


def test_shares_are_kept_until_it_is_known_of_how_much() -> None:
    assert [Amount.parse(value).of(8 * GIB) for value in ("50%", "12.5%", "0%", "1G", 4096)] == [
        4 * GIB, GIB, 0, GIB, 4096,
    ]  # fmt: skip


def test_what_the_host_cannot_honour_is_refused() -> None:
    config = parse_config('[pools.a]\nminimum = "3G"\n[pools.b]\nminimum = "2G"\n[pools.c]\nweight = 5')
    config.check(10 * GIB)
    with pytest.raises(ValueError, match=r"^pools: minimums of 5.00G in all are more than budget.maximum, 4.00G"):
        config.check(8 * GIB)
    with pytest.raises(ValueError, match=r"^budget.minimum: 60% is more than budget.maximum, 50%"):
        parse_config('[budget]\nminimum = "60%"').check(GIB)


@pytest.mark.parametrize(
    ("text", "host", "port"), [("127.0.0.1:9632", "127.0.0.1", 9632), ("[::1]:1", "::1", 1), (":80", "", 80)]
)
def test_addresses_come_apart(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port) == (host, port)


def test_a_key_that_is_not_there_is_unset() -> None:
    pool = parse_config("[pools.web]\nweight = 7").pools["web"]
    assert (pool.weight, pool.cap, pool.minimum, pool.compression) == (7, *[msgspec.UNSET] * 3)
