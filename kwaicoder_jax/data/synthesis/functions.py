"""Tasks from real code: functions whose docstrings have examples, cut out with what they need.

An example of a docstring (`doctest`) whose expected output is a literal is a test. A function is taken with the imports,
constants and functions of its module that it uses, if all names are found: then it runs alone, and running it says whether
the test is true of it.
"""

import ast
import builtins
import doctest
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BUILTINS = frozenset(dir(builtins))
_FEWEST, _MOST = 2, 12  # tests of a task
_LONGEST = 6000  # characters of a function

Function = ast.FunctionDef


class Task(NamedTuple):
    """Something to program, and how to see whether it was.

    Attributes:
      name: of the function.
      context: what stands before it: imports, constants, other functions. May be empty.
      solution: the function, its docstring in it.
      docstring: as written, without its indentation.
      tests: assertions, one a line.
    """

    name: str
    context: str
    solution: str
    docstring: str
    tests: tuple[str, ...]

    def program(self, solution: str | None = None) -> str:
        """What runs to its end if the solution, or another one, passes the tests."""
        return "\n".join((self.context, solution or self.solution, *self.tests, ""))


def tasks(text: str) -> Iterator[Task]:
    """Yields the tasks of a module's text, in its order; nothing of a text that is no Python of today."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in strings
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    scope = _scope(module)
    for node in module.body:
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            docstring = ast.get_docstring(node)
            source = ast.get_source_segment(text, node)
            if docstring and source and len(source) <= _LONGEST and ">>>" in docstring:
                found = _task(text, node, docstring, source, scope)
                if found is not None:
                    yield found


def _task(text: str, node: Function, docstring: str, source: str, scope: Mapping[str, ast.stmt]) -> Task | None:
    tests = _tests(docstring, node.name)
    needed = _needed(node, scope)
    if needed is None or not _FEWEST <= len(tests) <= _MOST:
        return None
    parts = [ast.get_source_segment(text, each) or "" for each in sorted(needed, key=lambda each: each.lineno)]
    return Task(node.name, "\n".join(parts), source, docstring, tuple(tests))


def _tests(docstring: str, name: str) -> list[str]:
    """Assertions of the examples that are one call with a literal for its result."""
    try:
        examples = doctest.DocTestParser().get_examples(textwrap.dedent(docstring))
    except ValueError:
        return []
    found = []
    for example in examples:
        source, want = example.source.strip(), example.want.strip()
        try:
            value, call = ast.literal_eval(want), ast.parse(source, mode="eval").body
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        names = {each.id for each in ast.walk(call) if isinstance(each, ast.Name)}
        is_told = repr(value) == want or ast.dump(ast.parse(repr(value))) == ast.dump(ast.parse(want))
        if is_told and name in names and names - {name} <= _BUILTINS and "\n" not in source:
            found.append(f"assert ({source}) == ({want})".replace("\n", " "))
    return found


def _scope(module: ast.Module) -> dict[str, ast.stmt]:
    """Which statement of a module gives each name; nothing for one that several do."""
    found: dict[str, ast.stmt] = {}
    twice: set[str] = set()
    for node in module.body:
        for name in _given(node):
            twice |= {name} & set(found)
            found[name] = node
    return {name: node for name, node in found.items() if name not in twice}


def _given(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import):
        return [(each.asname or each.name).split(".")[0] for each in node.names]
    if isinstance(node, ast.ImportFrom):
        is_relative = node.level > 0 or node.module == "__future__"
        return [] if is_relative else [each.asname or each.name for each in node.names]
    if isinstance(node, ast.Assign):
        return [each.id for target in node.targets for each in ast.walk(target) if isinstance(each, ast.Name)]
    return []


def _needed(node: ast.stmt, scope: Mapping[str, ast.stmt]) -> set[ast.stmt] | None:
    """The statements that a function needs, and these in turn; None if a name is nowhere."""
    needed: set[ast.stmt] = set()
    waiting = [node]
    while waiting:
        each = waiting.pop()
        for name in _free(each):
            if name in scope:
                if scope[name] is not node and scope[name] not in needed:
                    needed.add(scope[name])
                    waiting.append(scope[name])
            elif name not in _BUILTINS:
                return None
    return needed


def _free(node: ast.AST) -> set[str]:
    """Names that a statement reads and does not give itself, roughly: what it assigns anywhere counts as its own."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return set()
    read: set[str] = set()
    own: set[str] = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            (read if isinstance(each.ctx, ast.Load) else own).add(each.id)
        elif isinstance(each, ast.arg):
            own.add(each.arg)
        elif isinstance(each, ast.Import | ast.ImportFrom):
            own |= {(alias.asname or alias.name).split(".")[0] for alias in each.names}
        elif isinstance(each, ast.ExceptHandler):
            own |= {each.name} if each.name else set()
        elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and each is not node:
            own.add(each.name)
    return read - own
