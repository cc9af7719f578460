"""Tasks, mistakes and texts from a module that is written here, run in processes; and what cannot be taken is left."""

import ast
import concurrent.futures
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.synthesis.functions import tasks
from kwaicoder_jax.data.synthesis.mutations import mutants
from kwaicoder_jax.data.synthesis.verified import Settings, verified

MODULE = '''"""A module."""
import math
import os.path as paths
from collections import Counter

LIMIT = 10
OTHER, MORE = 1, 2


def _low(value):
    return value < LIMIT


def tally(values, least=0):
    """Count values from `least` up that are low.

    >>> tally([1, 5, 20])
    2
    >>> tally([1, 5, 20], least=2)
    1
    >>> tally([])
    0
    """
    # how many
    total = 0
    for value in values:
        if _low(value) and value >= least:
            total = total + 1
    return total


def root(x):
    """The whole square root.

    >>> root(17)
    4
    >>> root(16)
    4
    """
    return math.isqrt(x)


def wrong(x):
    """
    >>> wrong(1)
    3
    >>> wrong(2)
    4
    """
    return x + 1


def nothing(x):
    """
    >>> nothing(1) is None
    True
    >>> nothing(2) is None
    True
    """
    return None


def elsewhere(x):
    """
    >>> elsewhere(1)
    1
    >>> elsewhere(2)
    2
    """
    return undefined_name(x)


def few(x):
    """
    >>> few(1)
    1
    """
    return x


@decorated
def marked(x):
    """
    >>> marked(1)
    1
    >>> marked(2)
    2
    """
    return x
'''


def execute(programs):
    def passes(program):
        try:
            return (
                subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, timeout=20).returncode == 0
            )
        except subprocess.TimeoutExpired:
            return False

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(passes, programs))


def test_functions_come_with_what_they_need():
    found = {task.name: task for task in tasks(MODULE)}
    assert list(found) == ["tally", "root", "wrong", "nothing"]
    assert found["tally"].context == "LIMIT = 10\ndef _low(value):\n    return value < LIMIT"
    assert found["root"].context == "import math"
    assert found["tally"].tests[1] == "assert (tally([1, 5, 20], least=2)) == (1)"
    assert execute([task.program() for task in found.values()]) == [True, True, False, True]


@pytest.mark.parametrize("text", ["def f(:", "\0", "(" * 100_000, "", "x = 1"])
def test_what_is_no_python_has_no_tasks(text):
    assert list(tasks(text)) == []


def test_mistakes_change_one_part_and_leave_the_rest():
    (task, *_) = tasks(MODULE)
    found = list(mutants(task.solution))
    assert {each.kind for each in found} == {"operator", "comparison", "constant", "condition", "connective"}
    lines = task.solution.split("\n")
    for each in found:
        ast.parse(each.text)
        changed = [number for number, line in enumerate(each.text.split("\n"), 1) if line != lines[number - 1]]
        assert changed == [each.line]
        assert each.was in lines[each.line - 1]
        assert each.now in each.text.split("\n")[each.line - 1]
        assert "# how many" in each.text
        assert ">>> tally([1, 5, 20])" in each.text, "docstrings stay"
    assert len({each.text for each in found}) == len(found)


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("def f(é, b):\n    return (é) + (b)", "def f(é, b):\n    return (é) - (b)", "operator"),
        ("def f(a, b):\n    return a // b  # é", "def f(a, b):\n    return a % b  # é", "operator"),
        ("def f(a):\n    return a not in (1,)", "def f(a):\n    return a in (1,)", "comparison"),
        ("def f(a, b):\n    return pow(a,  b + 1)", "def f(a, b):\n    return pow(b + 1,  a)", "argument order"),
        (
            "def f(a, b):\n    while a and b:\n        pass",
            "def f(a, b):\n    while a or b:\n        pass",
            "connective",
        ),
        (
            "def f(a):\n    if (a > 1):\n        return 0",
            "def f(a):\n    if (not (a > 1)):\n        return 0",
            "condition",
        ),
        ("def f(a):\n    return -1", "def f(a):\n    return -2", "constant"),
    ],
)
def test_kinds_of_mistakes(before, after, kind):
    assert (kind, after) in [(each.kind, each.text) for each in mutants(before)]


def test_mistakes_of_real_functions_are_programs():
    for name in ("bisect.py", "heapq.py", "textwrap.py"):
        text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef):
                solution = ast.get_source_segment(text, node)
                for each in mutants(solution):
                    ast.parse(each.text)
                    assert each.text != solution


def test_texts_are_of_what_was_run():
    counts = Counter()
    document = Document("code", "a/module.py", MODULE, "module.py", "a", "python", "MIT")
    found = list(verified([document, Document("code", "b.py", "x = 1")], execute, counts, Settings(mistakes=4)))
    assert counts["task"] == 4
    assert counts["wrong"] == counts["trivial"] == 1
    assert counts["right"] == counts["docstring_to_code"] == counts["code_to_docstring"] == 2
    assert counts["mistake"] == counts["mending"] >= 3
    kinds = Counter(each.identifier.split("/")[-1].rstrip("0123456789") for each in found)
    assert kinds == {"docstring_to_code": 2, "code_to_docstring": 2, "mending": counts["mending"]}
    assert {each.licence for each in found} == {"MIT"}
    assert len({each.identifier for each in found}) == len(found)
    assert not any("wrong" in each.identifier or "nothing" in each.identifier for each in found)
    again = list(verified([document], execute, Counter(), Settings(mistakes=4)))
    assert again == found
    for each in found:
        if "docstring_to_code" in each.identifier:
            ast.parse(each.text)
    other = list(verified([document], execute, Counter(), Settings(mistakes=1, seed=1)))
    assert len(other) < len(found)
