# SPDX-License-Identifier: BSD-3-Clause
"""The rules for Python, on its syntax tree: what each leaves out, or has off by one."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from typing import Final

from tests.mutants.mutant import Edit, Fault

_LOCK: Final = re.compile(r"^(try_)?lock$|^flock$|take_control$")
_SYNC: Final = re.compile(r"^(fsync|fdatasync|flush)$|sync_directory$")
_RELEASE: Final = re.compile(r"^(close|unlink|callback|pop|discard|cancel|unlock|rmdir)$")
_MARK: Final = re.compile(r"^(add|append|forget.*|_forget.*|write_.*)$")
_LOCKED: Final = re.compile(r"(\block\b|_lock\b|\bchanging\b|_turns\b)")
_BORDERS: Final[dict[type[ast.cmpop], str]] = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
_OPERATORS: Final[dict[type[ast.cmpop], str]] = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}

_Edits = Iterator[tuple[str, Edit]]


class _Source:
    """The text of a file, by nodes."""

    def __init__(self, text: bytes) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._starts = [0]
        for line in text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def of(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end].decode()

    def replace(self, node: ast.expr | ast.stmt, text: str) -> Edit:
        return Edit(*self.span(node), text.encode())


def faults(text: bytes) -> Iterator[Fault]:
    """All faults that the rules make of a Python file."""
    source = _Source(text)
    for function, node in _walk(source.tree, ""):
        for make in _RULES:
            for rule, edit in make(source, node):
                yield Fault(rule, function, text.count(b"\n", 0, edit.start) + 1, (edit,))


def _walk(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """What is in functions, each with its function's name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _walk(child, f"{function}.{child.name}" if function else child.name)
        else:
            if function and not isinstance(node, ast.ClassDef | ast.arguments):
                yield function, child
            yield from _walk(child, function)


def _called(node: ast.AST) -> str:
    """The last name of what is called."""
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name
    return ""


def _error_ignored(source: _Source, node: ast.AST) -> _Edits:
    match node:
        case ast.Raise(exc=exc) if exc is None or _called(exc) != "AssertionError":  # that says what cannot be
            yield "error-ignored", source.replace(node, "pass")
        case ast.If(test=test):
            yield "condition", source.replace(test, f"not ({source.of(test)})")


def _call_left_out(source: _Source, node: ast.AST) -> _Edits:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        name = _called(node.value) if isinstance(node.value.func, ast.Attribute) else ""
        for rule, pattern in (
            ("lock-left-out", _LOCK), ("sync-left-out", _SYNC), ("release-left-out", _RELEASE),
            ("mark-left-out", _MARK),
        ):  # fmt: skip
            if pattern.search(name):
                yield rule, source.replace(node, "pass")
    elif isinstance(node, ast.Call) and _LOCK.search(_called(node)):
        yield "lock-left-out", source.replace(node, "True")
    elif isinstance(node, ast.With | ast.AsyncWith) and _LOCKED.search(source.of(node.items[0].context_expr)):
        start, _ = source.span(node)
        end, _ = source.span(node.body[0])
        header = source.text[start:end]
        yield "lock-left-out", Edit(start, start + header.index(b":\n"), b"if True")


def _flag_left_out(source: _Source, node: ast.AST) -> _Edits:
    match node:
        case ast.Assign(targets=[ast.Attribute()], value=ast.Constant(value=bool())):
            yield "flag-left-out", source.replace(node, "pass")
        case ast.BinOp(left=left, op=ast.BitOr(), right=right) if re.search(r"\b[A-Z]+_[A-Z_]+$", source.of(right)):
            yield "flag-left-out", source.replace(node, source.of(left))
        case ast.Call(keywords=keywords):
            for keyword in keywords:
                if isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool):
                    yield "flag-left-out", source.replace(keyword.value, str(not keyword.value.value))


def _count_left_out(source: _Source, node: ast.AST) -> _Edits:
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        yield "count-left-out", source.replace(node, "pass")


def _border(source: _Source, node: ast.AST) -> _Edits:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            for one, op, other in zip([left, *others], ops, others, strict=False):
                if type(op) in _BORDERS:
                    start, end = source.span(one)[1], source.span(other)[0]
                    between = source.text[start:end].decode()
                    text = between.replace(_OPERATORS[type(op)], _BORDERS[type(op)], 1)
                    yield "border", Edit(start, end, text.encode())
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=ast.Constant(value=1)):
            yield "border", source.replace(node, source.of(left))


_RULES: Final[tuple[Callable[[_Source, ast.AST], _Edits], ...]] = (
    _error_ignored, _call_left_out, _flag_left_out, _count_left_out, _border,
)  # fmt: skip
