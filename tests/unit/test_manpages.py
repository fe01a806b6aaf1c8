# SPDX-License-Identifier: BSD-3-Clause
"""The manual pages are made, are right to groff, and tell of every option and key."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.manpages import PAGES, subcommands
from tests.support.harness import ROOT
from tmemd.cli import commands
from tmemd.daemon import start
from tmemd.daemonconfig import (
    AccessConfig,
    BudgetConfig,
    DaemonConfig,
    DemotionConfig,
    MetricsConfig,
    PoolConfig,
    TmpfsConfig,
)
from tmemd.libvirt import program

TABLES = (DaemonConfig, AccessConfig, TmpfsConfig, BudgetConfig, DemotionConfig, MetricsConfig, PoolConfig)
COMMON = {"--socket", "--pools", "--json"}


def shown(page: str, *options: str) -> str:
    """What groff makes of a page for a terminal that is wide enough. AssertionError when it complains."""
    command = ["groff", "-man", "-ww", "-Tascii", "-P-cbou", "-rLL=200n", *options]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def long_options(text: str) -> set[str]:
    """The long options that begin an item, or stand second in one behind a short one."""
    return set(re.findall(r"^ {7}(?:-\w, )?(--[a-z-]+)", text, flags=re.MULTILINE))


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser that it tells of, but for --help."""
    told = [each for each in parser._actions if each.help != argparse.SUPPRESS]
    return {name for each in told for name in each.option_strings if name.startswith("--")} - {"--help"}


def test_they_are_written_where_man_looks(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "scripts/manpages.py", tmp_path], cwd=ROOT, check=True)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")} == {
        "man1/nbdkit-tmem-plugin.1", "man5/tmemd.toml.5", "man8/tmemctl.8", "man8/tmemd-libvirt.8", "man8/tmemd.8",
    }  # fmt: skip
    for path in tmp_path.glob("*/*"):
        assert path.read_text() == PAGES[path.name]()


@pytest.mark.parametrize("name", PAGES)
def test_groff_has_no_complaint(name: str) -> None:
    text = shown(PAGES[name]())
    assert re.search(rf"^NAME\n +{re.escape(name[:-2])} - \w", text, flags=re.MULTILINE)
    assert "`" not in text
    assert "%(" not in text


def test_every_option_of_tmemd_is_told() -> None:
    assert long_options(shown(PAGES["tmemd.8"]())) == options_of(start.build_parser())


def test_every_option_of_tmemd_libvirt_is_told() -> None:
    parser = program.build_parser()
    options = options_of(parser).union(*map(options_of, subcommands(parser).values()))
    assert long_options(shown(PAGES["tmemd-libvirt.8"]())) == options


def test_every_command_of_tmemctl_and_its_options_are_told() -> None:
    text = shown(PAGES["tmemctl.8"]())
    _, *sections = re.split(r"^   (?=tmemctl )", text.partition("\nOPTIONS")[0], flags=re.MULTILINE)
    told = {section.split()[1]: long_options(section) for section in sections}
    (each,) = (each.choices for each in commands.build_parser()._actions if isinstance(each.choices, dict))
    assert told == {name: options_of(parser) - COMMON for name, parser in each.items()}
    assert long_options(text.partition("\nOPTIONS")[2]) == COMMON


def test_every_key_of_the_configuration_is_told() -> None:
    found = set(re.findall(r"^ {3}(?:\[| {4}(?=\w+ = ))(\w+)", shown(PAGES["tmemd.toml.5"]()), flags=re.MULTILINE))
    assert found == {key for table in TABLES for key in table.__struct_fields__}


def test_every_key_of_a_device_is_told_here_and_in_the_documents() -> None:
    page = shown(PAGES["nbdkit-tmem-plugin.1"]())
    keys = set(re.findall(r"^ {7}([a-z]+)=\S+$", page, flags=re.MULTILINE))
    options = (ROOT / "docs/operating.md").read_text().partition("## Options of a device")[2].partition("\n## ")[0]
    assert {"name", "backing", "vhost"} < keys
    assert keys == set(re.findall(r"^\| `([a-z]+)=", options, flags=re.MULTILINE))
