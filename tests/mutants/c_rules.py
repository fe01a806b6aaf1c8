# SPDX-License-Identifier: BSD-3-Clause
"""The rules for C, on its syntax tree: what each leaves out, or has off by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

import tree_sitter_c
from tree_sitter import Language, Node, Parser

from tests.mutants.mutant import Edit, Fault

_ERRORS: Final = {"error", "failed"}  # what variables that hold an errno are called
_ERRNO: Final = re.compile(r"\b(errno|E[A-Z]{2,})\b")
_FAILURE: Final = re.compile(r"\b(error|failed|errno|E[A-Z]{2,}|false|NULL|FAILED)\b")
_FLAG: Final = re.compile(r"TM_WORD_(CLEAN|WRITING|UNVERIFIED)")
_LOCK: Final = re.compile(r"(?:^|(?<=_))(?:rd|wr)?(lock|look)(?=_|$)")
_UNLOCK: Final = re.compile(r"(?:^|_)un(lock|look)(?=_|$)")
_SYNC: Final = re.compile(r"(sync|flush)$")
_MARK: Final = re.compile(
    r"(?<!is_)(mark|keep|cleaning|writing|set_clean|wait_for_pages|begin_|bitmap_set$|overwrite_lock_pages)"
)
_COUNT: Final = re.compile(r"^count(_|$)|^stats_(add|sub)$|^(index_account|ages_change)$|^atomic_fetch_(add|sub)")
_STORE: Final = re.compile(r"^atomic_store")
_RELEASE: Final = re.compile(r"^(?!pthread_).*(free|give|punch|release|munmap|destroy|unlist|_put$|close)")
_BORDERS: Final = {"<": b"<=", "<=": b"<", ">": b">=", ">=": b">"}

_Edits = Iterator[tuple[str, list[Edit]]]


def faults(source: bytes) -> Iterator[Fault]:
    """All faults that the rules make of a C file."""
    parser = Parser(Language(tree_sitter_c.language()))
    for function in _find(parser.parse(source).root_node, "function_definition"):
        name, body = _function_name(function), function.child_by_field_name("body")
        if body is None or function.has_error:
            continue
        for rule, edits in _lock_left_out(body):
            yield _fault(source, name, rule, edits)
        for node in _walk(body):
            for make in _RULES:
                for rule, edits in make(node):
                    yield _fault(source, name, rule, edits)


def _fault(source: bytes, function: str, rule: str, edits: list[Edit]) -> Fault:
    return Fault(rule, function, source.count(b"\n", 0, edits[0].start) + 1, tuple(edits))


def _walk(node: Node) -> Iterator[Node]:
    yield node
    for child in node.named_children:
        yield from _walk(child)


def _find(node: Node, kind: str) -> Iterator[Node]:
    return (each for each in _walk(node) if each.type == kind)


def _text(node: Node | None) -> str:
    return node.text.decode() if node is not None and node.text is not None else ""


def _function_name(function: Node) -> str:
    declarator = function.child_by_field_name("declarator")
    while declarator is not None and declarator.type != "identifier":
        declarator = declarator.child_by_field_name("declarator")
    return _text(declarator)


def _replace(node: Node, text: str) -> list[Edit]:
    return [Edit(node.start_byte, node.end_byte, text.encode())]


def _leave_out(statement: Node) -> list[Edit]:
    return _replace(statement, "(void)0;")


def _called(node: Node) -> str:
    """The name of the function that this expression, or statement of one, calls."""
    if node.type == "expression_statement" and node.named_children:
        node = node.named_children[0]
    return _text(node.child_by_field_name("function")) if node.type == "call_expression" else ""


def _is_statement(node: Node) -> bool:
    return node.parent is not None and node.parent.type == "expression_statement"


def _error_ignored(node: Node) -> _Edits:
    rule = "error-ignored"
    match node.type:
        case "if_statement":
            condition, body = node.child_by_field_name("condition"), node.child_by_field_name("consequence")
            if condition is not None and body is not None and (_is_error(condition) or _fails(body)):
                yield rule, _replace(condition, f"((void){_text(condition)}, 0)")
        case "unary_expression" if _text(node.child_by_field_name("operator")) == "!":
            if _text(node.child_by_field_name("argument")) in _ERRORS:
                yield rule, _replace(node, "1")
        case "assignment_expression" | "init_declarator":
            left = node.child_by_field_name("left") or node.child_by_field_name("declarator")
            right = node.child_by_field_name("right") or node.child_by_field_name("value")
            if right is not None and _text(left) in _ERRORS and right.type in {"call_expression", "identifier"}:
                yield rule, _replace(right, f"((void){_text(right)}, 0)")
        case "conditional_expression" if node.parent is not None and node.parent.type != "conditional_expression":
            branches = (_text(node.child_by_field_name(name)) for name in ("consequence", "alternative"))
            if any(_ERRNO.search(branch) for branch in branches):
                yield rule, _replace(node, f"((void)({_text(node)}), 0)")


def _is_error(condition: Node) -> bool:
    return _text(condition).strip("()") in _ERRORS


def _fails(body: Node) -> bool:
    """Whether a body does nothing in the end but return that something failed."""
    last = body.named_children[-1] if body.type == "compound_statement" and body.named_children else body
    return last.type == "return_statement" and bool(_FAILURE.search(_text(last)))


def _lock_left_out(body: Node) -> _Edits:
    """Both a lock and what unlocks it, so that it is a race and no deadlock."""
    statements: dict[str, list[Node]] = {}
    for node in _find(body, "expression_statement"):
        if _called(node):
            statements.setdefault(_text(node), []).append(node)
    paired = set()
    for text, locks in statements.items():
        called = _called(locks[0])
        unlock = text.replace(called, _LOCK.sub(r"un\1", called), 1)
        if _LOCK.search(called) and unlock in statements:
            paired.add(unlock)
            yield "lock-left-out", [edit for node in locks + statements[unlock] for edit in _leave_out(node)]
    for text, unlocks in statements.items():
        if _UNLOCK.search(_called(unlocks[0])) and text not in paired and (place := _after_locking(body)):
            released = Edit(place, place, f" {text}".encode())
            yield "lock-left-out", [released, *(edit for node in unlocks for edit in _leave_out(node))]


def _after_locking(body: Node) -> int | None:
    """Where whatever the function locks, and unlocks in other words, could be unlocked at once."""
    for call in _find(body, "call_expression"):
        if not _LOCK.search(_called(call)):
            continue
        statement = call
        while statement.parent is not None and statement.parent.type != "compound_statement":
            statement = statement.parent
        check = statement.next_named_sibling
        refused = check is not None and check.type == "if_statement" and statement.type != "if_statement"
        return check.end_byte if check is not None and refused else statement.end_byte
    return None


def _call_left_out(node: Node) -> _Edits:
    if node.type != "call_expression":
        return
    name = _called(node)
    for rule, pattern, as_value in (
        ("sync-left-out", _SYNC, True), ("mark-left-out", _MARK, True), ("count-left-out", _COUNT, False),
        ("flag-left-out", _STORE, False), ("release-left-out", _RELEASE, False),
    ):  # fmt: skip
        if pattern.search(name) and (as_value or _is_statement(node)):
            yield rule, _replace(node, "(void)0" if _is_statement(node) else "0")
            return


def _flag_left_out(node: Node) -> _Edits:
    rule = "flag-left-out"
    left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
    operator = _text(node.child_by_field_name("operator"))
    if node.type == "binary_expression" and left is not None and right is not None:
        if operator in {"|", "&"} and _FLAG.fullmatch(_text(right).lstrip("~")):
            is_test = operator == "&" and not _text(right).startswith("~")
            yield rule, _replace(node, "0" if is_test else _text(left))
    elif node.type == "assignment_expression" and _is_statement(node) and right is not None:
        if _FLAG.fullmatch(_text(right)) or right.type in {"true", "false"}:
            yield rule, _replace(node, "(void)0")
    elif node.type in {"true", "false"} and node.parent is not None and node.parent.type == "argument_list":
        yield rule, _replace(node, "false" if node.type == "true" else "true")


def _sum_left_out(node: Node) -> _Edits:
    """What is counted without a call: fields of structures."""
    operator = _text(node.child_by_field_name("operator"))
    if _is_statement(node) and operator in {"++", "--", "+=", "-="}:
        target = node.child_by_field_name("left") or node.child_by_field_name("argument")
        if target is not None and target.type in {"field_expression", "subscript_expression"}:
            yield "count-left-out", _replace(node, "(void)0")


def _border(node: Node) -> _Edits:
    if node.type != "binary_expression":
        return
    operator = node.child_by_field_name("operator")
    left, right = node.child_by_field_name("left"), node.child_by_field_name("right")
    if operator is None or left is None or right is None:
        return
    if _text(operator) in _BORDERS and _text(right) != "0":  # of an errno's sign, _error_ignored takes care
        yield "border", _replace(operator, _BORDERS[_text(operator)].decode())
    elif _text(operator) in {"+", "-"} and _text(right) == "1":
        yield "border", _replace(node, _text(left))


_RULES: Final[tuple[Callable[[Node], _Edits], ...]] = (
    _error_ignored, _call_left_out, _flag_left_out, _sum_left_out, _border,
)  # fmt: skip
