# SPDX-License-Identifier: BSD-3-Clause
"""bash, zsh and fish complete every command, every option, and the names of pools."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from scripts.completions import FILES, parsers
from tests.support import fakes, harness
from tests.support.harness import ROOT

# Each is given a program's file, and words of which the last is to be completed; it says a candidate on each line.
SHELLS: Final = {
    "bash": ["bash", "-c", r"""source "$0"; compopt() { :; }; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
        "_shtab_$1"; printf '%s\n' "${COMPREPLY[@]}" """],
    # What zsh would be told, without its line editor.
    "zsh": ["zsh", "-f", "-c", r"""compdef() { }; _describe() { print -l -- ${(P)2} }; compadd() { print -l -- $names }
        eval "$(<$0)"; parts=($argv[1,-2]); specs=_shtab_${${(j:_:)parts}//-/_}_options
        if [[ $argv[-1] == -* ]]; then print -l -- ${(P)specs}
        elif (( $#parts == 1 )); then _shtab_$1_commands
        else ${${(P)specs}[-1]##*:}; fi"""],
    "fish": ["fish", "--no-config", "-c", "source $argv[1]; complete -C (string join ' ' -- $argv[2..])"],
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shells find them."""
    path = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, ROOT / "scripts/completions.py", path], cwd=ROOT, check=True)
    return path


def complete(shell: str, written: Path, *words: str, **environment: str) -> set[str]:
    """What a shell offers for the last of these words, bare. zsh offers what does not fit, too."""
    command = [*SHELLS[shell], str(written / FILES[shell].format(words[0])), *words]
    done = subprocess.run(command, env=harness.environment() | environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = (line.partition("\t")[0].removeprefix("(- : *)").removeprefix("*") for line in done.stdout.splitlines())
    return {line if shell != "zsh" else line.split("[")[0].split(":")[0] for line in lines}


def commands() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """The words that a command line begins with, and its parser."""
    for parser in parsers():
        yield (parser.prog,), parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from (((parser.prog, name), each) for name, each in action.choices.items())


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_completed(shell: str, written: Path) -> None:
    seen = list(commands())
    assert len(seen) > 15
    for words, parser in seen:
        told = (action for action in parser._actions if action.help != argparse.SUPPRESS)
        long = {name for action in told for name in action.option_strings if name.startswith("--")}
        assert complete(shell, written, *words, "--") >= long, words
    names = {words[1] for words, _ in seen if len(words) == 2}
    assert complete(shell, written, "tmemctl", "") >= names


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("command", ["show", "freeable", "check"])
def test_names_of_pools_are_completed(shell: str, command: str, written: Path, directory: Path) -> None:
    with fakes.tmemd(directory) as tmemd, ExitStack() as pools:
        for name in ("web", "web2", "db"):
            pools.enter_context(fakes.pool(tmemd.directory, name))
        found = complete(shell, written, "tmemctl", command, "w", TMEMD_SOCKET=str(tmemd.socket))
    assert found - {"db"} == {"web", "web2"}
