"""Mistakes of one place, as programmers make them: the text of a function with one of its parts changed.

Parts are found in the syntax tree and changed in the text, so that comments and layout stay.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

_OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "%", ast.Mod: "//", ast.Div: "*",
    ast.BitAnd: "|", ast.BitOr: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip
_COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in",
    ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip


class Mutant(NamedTuple):
    """A changed function.

    Attributes:
      kind: of the mistake: "operator", "comparison", "constant", "condition", "connective" or "argument order".
      text: of the function.
      line: that was changed, from 1.
      was: the changed part before.
      now: and after.
    """

    kind: str
    text: str
    line: int
    was: str
    now: str


def mutants(text: str) -> Iterator[Mutant]:
    """Yields every mutant of a function's text, from its top to its end; docstrings stay. SyntaxError if it is none."""
    source, lines = text.encode(), _line_starts(text)
    tree = ast.parse(text)
    skipped = {id(each) for node in ast.walk(tree) for each in _docstring(node)}
    for node in sorted(ast.walk(tree), key=lambda each: (getattr(each, "lineno", 0), getattr(each, "col_offset", 0))):
        if id(node) in skipped:
            continue
        for kind, first, last, now in _changes(node, source, lines):
            was = source[first:last].decode()
            changed = (source[:first] + now.encode() + source[last:]).decode()
            if changed != text and _parses(changed):
                yield Mutant(kind, changed, source[:first].count(b"\n") + 1, was.strip(), now.strip())


Change = tuple[str, int, int, str]


def _changes(node: ast.AST, source: bytes, lines: list[int]) -> Iterator[Change]:
    def start(each: ast.expr) -> int:
        return lines[each.lineno - 1] + each.col_offset

    def end(each: ast.expr) -> int:
        return lines[(each.end_lineno or 1) - 1] + (each.end_col_offset or 0)

    def between(left: ast.expr, right: ast.expr, kind: str, now: str) -> Iterator[Change]:
        """The operator between two operands, which may stand in brackets of their own."""
        gap = source[end(left) : start(right)]
        operator = gap.strip(b" \t\n()\\")
        if operator and b"#" not in gap:
            first = end(left) + gap.index(operator)
            yield kind, first, first + len(operator), now

    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        yield from between(node.left, node.right, "operator", _OPERATORS[type(node.op)])
    elif isinstance(node, ast.Compare):
        for left, operator, right in zip([node.left, *node.comparators[:-1]], node.ops, node.comparators, strict=True):
            if type(operator) in _COMPARISONS:
                yield from between(left, right, "comparison", _COMPARISONS[type(operator)])
    elif isinstance(node, ast.BoolOp):
        now = "or" if isinstance(node.op, ast.And) else "and"
        yield from between(node.values[0], node.values[1], "connective", now)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield "constant", start(node), end(node), str(node.value + 1)
        if node.value > 0:
            yield "constant", start(node), end(node), str(node.value - 1)
    elif isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Constant):
        test = source[start(node.test) : end(node.test)].decode()
        yield "condition", start(node.test), end(node.test), f"not ({test})"
    elif (
        isinstance(node, ast.Call)
        and len(node.args) >= 2
        and not any(isinstance(a, ast.Starred) for a in node.args[:2])
    ):
        one, other = node.args[:2]
        middle = source[end(one) : start(other)].decode()
        parts = [source[start(each) : end(each)].decode() for each in (other, one)]
        yield "argument order", start(one), end(other), middle.join(parts)


def _line_starts(text: str) -> list[int]:
    """In bytes, as the syntax tree counts columns."""
    found = [0]
    for line in text.encode().split(b"\n"):
        found.append(found[-1] + len(line) + 1)
    return found


def _docstring(node: ast.AST) -> list[ast.AST]:
    body = getattr(node, "body", None)
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and body and isinstance(body[0], ast.Expr):
        return list(ast.walk(body[0]))
    return []


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
