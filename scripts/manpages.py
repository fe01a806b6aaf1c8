# SPDX-License-Identifier: BSD-3-Clause
"""Write the manual pages, from what the programs, the plugin and the example of a configuration say themselves.

python scripts/manpages.py DIR        # DIR/man8/tmemd.8 and so on; /usr/local/share/man is where man looks
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from tmemd import plugin_path, version
from tmemd.cli import commands
from tmemd.daemon import start
from tmemd.libvirt import program

EXAMPLE: Final = Path(__file__).with_name("tmemd.toml.example")
COMMON: Final = {"--socket", "--pools", "--json"}  # options of nearly every command of tmemctl, which are told once
SEE: Final = {
    "tmemd(8)": "tmemctl(8), tmemd.toml(5), nbdkit-tmem-plugin(1)",
    "tmemctl(8)": "tmemd(8), tmemd.toml(5), nbdkit-tmem-plugin(1)",
    "tmemd-libvirt(8)": "tmemctl(8), virsh(1)",
    "tmemd.toml(5)": "tmemd(8), tmemctl(8)",
    "nbdkit-tmem-plugin(1)": "nbdkit(1), nbdkit-python-plugin(3), tmemd(8), tmemctl(8)",
}
_KEY: Final = re.compile(r"^  ([a-z]+=\S+) +((?:.|\n(?!  \S))*)", re.MULTILINE)
_SETTING: Final = re.compile(r"(#?)(\w+ = \S+)(?:\s+# (.*))?")


def escape(text: str) -> str:
    """Text as roff shows it: no character is a command, and an option's dashes can be copied."""
    text = text.replace("\\", r"\e").replace("'", r"\(aq")
    text = re.sub(r"(?<![\w])-|(?<=-)-", r"\-", text)
    return re.sub(r"^\.", r"\&.", text, flags=re.MULTILINE)


def bold(text: str) -> str:
    """Text that is typed as it stands."""
    with_dashes = re.sub(r"(?<!\\)-", r"\-", escape(text))
    return rf"\fB{with_dashes}\fR"


def paragraphs(text: str) -> Iterator[str]:
    """What stands between blank lines, as prose."""
    for paragraph in text.strip().split("\n\n"):
        yield f".PP\n{escape(' '.join(paragraph.split()))}"


def item(what: str, text: str) -> str:
    """A term in roff, and what it means below it."""
    return f".TP\n{what}\n{escape(' '.join(text.split()))}"


def page(name: str, summary: str, sections: Mapping[str, Iterable[str]]) -> str:
    """A manual page, NAME(SECTION). No word is hyphenated, for it may be one to be typed."""
    title, section = name.rstrip(")").split("(")
    head = [f'.TH {title.upper()} {section} "" "tmemd {version()}"', ".nh", ".ad l"]
    name_section = [".SH NAME", rf"{escape(title)} \- {escape(summary)}"]
    body = [line for heading, text in sections.items() for line in (f".SH {heading}", *text)]
    return "\n".join([*head, *name_section, *body, ".SH SEE ALSO", escape(SEE[name]), ""])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a program's commands."""
    (found,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    return dict(found.choices)


def call(command: argparse.ArgumentParser) -> str:
    """How a command is called, without its options."""
    formatter = argparse.HelpFormatter(command.prog, width=sys.maxsize)
    formatter.add_usage(None, [each for each in command._actions if not each.option_strings], [], prefix="")
    return formatter.format_help().strip()


def term(action: argparse.Action) -> str:
    """An argument as it is typed: '-l, --long', '--weight N', 'NAME'."""
    choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
    value = action.metavar if isinstance(action.metavar, str) else choices
    names = ", ".join(bold(name) for name in action.option_strings)
    return names if action.nargs == 0 else rf"{names} \fI{escape(value)}\fR".lstrip()


def arguments(parser: argparse.ArgumentParser, skip: Iterable[str] = ()) -> Iterator[str]:
    """The arguments of a parser that have something to be said of, but for --help and those in *skip*."""
    for action in parser._actions:
        is_told = action.help not in (None, argparse.SUPPRESS) and not isinstance(action, argparse._HelpAction)
        if is_told and not set(action.option_strings) & set(skip):
            yield item(term(action), (action.help or "") % {**vars(action), "prog": parser.prog})


def daemon() -> str:
    """The page of tmemd."""
    parser = start.build_parser()
    text = """tmemd makes the pools of devices, decides twice a second how much RAM each may take, and answers
        tmemctl(8). No page passes through it: while it is away, devices go on with their last targets.

        SIGHUP has it read its configuration again. SIGTERM and SIGINT end it; SIGKILL does no harm."""
    return page("tmemd(8)", "shares out a host's RAM among guests' devices", {
        "SYNOPSIS": [rf"{bold('tmemd')} [\fIOPTION\fR...]"],
        "DESCRIPTION": paragraphs(text),
        "OPTIONS": arguments(parser),
        "EXIT STATUS": ["0; 1 after an error; 2 for a wrong command line."],
    })  # fmt: skip


def control() -> str:
    """The page of tmemctl."""
    parser = commands.build_parser()
    parsers = subcommands(parser)
    told = [line for command in parsers.values() for line in (f".SS {escape(call(command))}", *about(command))]
    return page("tmemctl(8)", "looks at the pools of devices and changes them", {
        "SYNOPSIS": [rf"{bold('tmemctl')} \fICOMMAND\fR [\fIOPTION\fR...] [\fIARGUMENT\fR...]"],
        "DESCRIPTION": paragraphs(f"{parser.description}\n\n{parser.epilog}"),
        "COMMANDS": told,
        "OPTIONS OF MOST COMMANDS": arguments(parsers["flush"]),
        "ENVIRONMENT": [item(bold("TMEMD_SOCKET"), "Where tmemd listens, for those who say no --socket.")],
    })  # fmt: skip


def about(command: argparse.ArgumentParser) -> Iterator[str]:
    """What a command does, and the arguments that are its own."""
    yield from paragraphs(command.description or "")
    yield from arguments(command, COMMON)


def libvirt() -> str:
    """The page of tmemd-libvirt."""
    parser = program.build_parser()
    parsers = subcommands(parser)
    told = [line for command in parsers.values() for line in (f".SS {escape(call(command))}", *about(command))]
    return page("tmemd-libvirt(8)", "libvirt's hook and service for guests on devices", {
        "SYNOPSIS": [rf"{bold('tmemd-libvirt')} [\fIOPTION\fR...] \fICOMMAND\fR [\fIARGUMENT\fR...]"],
        "DESCRIPTION": paragraphs(f"{parser.description}\n\n{parser.epilog}"),
        "COMMANDS": told,
        "OPTIONS": arguments(parser),
        "FILES": [item(bold("/etc/libvirt/hooks/qemu.d/tmemd"), "What libvirt runs."),
                  item(bold("/var/lib/tmemd/libvirt/NAME.json"), "What became of the guest that used a device last.")],
    })  # fmt: skip


def configuration() -> str:
    """The page of tmemd.toml."""
    return page("tmemd.toml(5)", "configuration of tmemd", {
        "DESCRIPTION": settings(re.sub("^#$", "", EXAMPLE.read_text(), flags=re.MULTILINE).replace("`", "'")),
    })  # fmt: skip


def settings(example: str) -> Iterator[str]:
    """Paragraphs, tables and keys of the example, each with the comment above it and beside it."""
    comment: list[str] = []
    for line in example.splitlines():
        if line.startswith("# "):
            comment.append(line.removeprefix("# "))
            continue
        if found := _SETTING.fullmatch(line):
            shown = bold(found[2]) + (" (an example)" if found[1] else "")
            yield item(shown, " ".join([*comment, found[3] or ""]))
        else:
            yield from [f".SS {escape(line.lstrip('#'))}"] if line else []
            yield from paragraphs(" ".join(comment)) if comment else []
        comment = []


def plugin() -> str:
    """The page of the plugin."""
    summary, synopsis, text = (ast.get_docstring(ast.parse(plugin_path().read_text())) or "").split("\n\n", 2)
    calls = synopsis.replace("tmem.py", '"$(tmemctl plugin-path)"').splitlines()
    return page("nbdkit-tmem-plugin(1)", summary.partition(": ")[2].rstrip("."), {
        "SYNOPSIS": [".nf", *(escape(line.strip()) for line in calls), ".fi"],
        "DESCRIPTION": keys(text),
    })  # fmt: skip


def keys(text: str) -> Iterator[str]:
    """Paragraphs, and lists of keys with what they mean."""
    for paragraph in text.split("\n\n"):
        found = _KEY.findall(paragraph)
        yield from [item(bold(key), meaning) for key, meaning in found] or paragraphs(paragraph)


PAGES: Final = {
    "tmemd.8": daemon, "tmemctl.8": control, "tmemd-libvirt.8": libvirt, "tmemd.toml.5": configuration,
    "nbdkit-tmem-plugin.1": plugin,
}  # fmt: skip


def main() -> int:
    """Write them all below the directory that is named."""
    parser = argparse.ArgumentParser(description="Write the manual pages below a directory.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="as /usr/local/share/man")
    directory = parser.parse_args().directory
    for name, make in PAGES.items():
        folder = directory / f"man{name[-1]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
