"""Whether a text is what its language's grammar says, by how much of it the grammar finds no place for.

tree-sitter parses in bounded memory, without recursion and with recovery from errors. A share, not a yes or no: macros
and dialects break the grammar in places of files that are good. Languages without an installed grammar are not judged.
"""

import functools
import importlib
import itertools
import math
import re
from typing import Any, NamedTuple

# language: (module of the wheel tree-sitter-..., name of its function)
_GRAMMARS = {
    "c": ("tree_sitter_c", "language"),
    "cpp": ("tree_sitter_cpp", "language"),
    "csharp": ("tree_sitter_c_sharp", "language"),
    "css": ("tree_sitter_css", "language"),
    "cuda": ("tree_sitter_cuda", "language"),
    "go": ("tree_sitter_go", "language"),
    "haskell": ("tree_sitter_haskell", "language"),
    "html": ("tree_sitter_html", "language"),
    "java": ("tree_sitter_java", "language"),
    "javascript": ("tree_sitter_javascript", "language"),
    "json": ("tree_sitter_json", "language"),
    "julia": ("tree_sitter_julia", "language"),
    "lua": ("tree_sitter_lua", "language"),
    "ocaml": ("tree_sitter_ocaml", "language_ocaml"),
    "php": ("tree_sitter_php", "language_php"),
    "python": ("tree_sitter_python", "language"),
    "ruby": ("tree_sitter_ruby", "language"),
    "rust": ("tree_sitter_rust", "language"),
    "scala": ("tree_sitter_scala", "language"),
    "shell": ("tree_sitter_bash", "language"),
    "tsx": ("tree_sitter_typescript", "language_tsx"),
    "typescript": ("tree_sitter_typescript", "language_typescript"),
}
_PYTHON_2 = re.compile(rb"(?:\A|\n)[ \t]*+(print|exec)[ \t]++[^=\s]")  # a first look; the tree decides
_FIRST = 20  # of such lines
_CHUNK = 1 << 16
# The parser reports each 100 of its steps: real files have one report in 70 bytes or more, counted and not timed, so
# that the verdict is the same on any machine.
_STEPS, _BYTES_A_STEP = 500, 25
_HERE_DOCUMENTS = 300  # or one in 100 bytes; << shifts too
_MOST_CHILDREN = 100_000  # of a node; one with more is lost as a whole, if it is an error
_MOST_BYTES = 500_000  # larger texts are not judged; hostile ones of 1 MB took 1 GB
_MOST_BYTES_OF_SHELL = 100_000  # whose grammar is ambiguous: 650 MB for 100 kB of Python taken for shell


class Faults(NamedTuple):
    """What the grammar says.

    Attributes:
      share: of the bytes, in errors but not in the whole statements within them; a missing sign is one byte. 1: not
        parsed within the steps that real texts take. nan: unknown.
      python_2: print and exec statements, 20 at most.
    """

    share: float
    python_2: int = 0


UNKNOWN = Faults(math.nan)


@functools.cache
def _parser(language: str) -> Any:
    module, function = _GRAMMARS[language]
    try:
        import tree_sitter

        capsule = getattr(importlib.import_module(module), function)()
    except ImportError:
        return None
    return tree_sitter.Parser(tree_sitter.Language(capsule))


def known(language: str) -> bool:
    """Whether the language's grammar is installed."""
    return language in _GRAMMARS and _parser(language) is not None


def check(text: str, language: str) -> Faults:
    """Parses the text; `UNKNOWN` without a grammar, or over 500 kB (shell: 100 kB)."""
    parser = _parser(language) if language in _GRAMMARS else None
    raw = text.encode()
    if parser is not None and b"\0" in raw:  # in no source; the scanner of shells takes quadratic time over them
        return Faults(1.0)
    if parser is None or len(raw) > (_MOST_BYTES_OF_SHELL if language == "shell" else _MOST_BYTES):
        return UNKNOWN
    root = _parsed(parser, raw)
    if root is None:
        return Faults(1.0)
    old = _python_2(root, raw) if language == "python" else 0
    return Faults(min(1.0, _lost(root) / max(len(raw), 1)), old)


def _parsed(parser: Any, raw: bytes) -> Any:
    """The tree's root; None where recovery from errors takes more steps than any real text (time can be quadratic)."""
    # The scanner of shells takes quadratic time over openings of here-documents.
    if raw.count(b"<<") > max(_HERE_DOCUMENTS, len(raw) // 100):
        return None
    steps = itertools.count()
    limit = max(_STEPS, len(raw) // _BYTES_A_STEP)
    try:
        tree = parser.parse(
            lambda offset, _: raw[offset : offset + _CHUNK], progress_callback=lambda *_: next(steps) > limit
        )
    except ValueError:
        parser.reset()  # else the next text would be taken for the rest of this one
        return None
    return tree.root_node


def _lost(root: Any) -> int:
    """Bytes in errors, outside the comments and the nodes of parts within them: those were understood, or have errors.

    A walk of our own over the nodes with errors: a query takes time quadratic in the children of one node.
    """
    lost, nodes = 0, [root] if root.has_error else []
    while nodes:
        node = nodes.pop()
        if node.is_missing:
            lost += 1
            continue
        children = node.children if node.child_count <= _MOST_CHILDREN else []
        if node.is_error:
            whole = (child for child in children if child.is_extra or (child.is_named and child.child_count))
            lost += node.end_byte - node.start_byte - sum(child.end_byte - child.start_byte for child in whole)
        nodes += [child for child in children if child.has_error]
    return lost


def _python_2(root: Any, raw: bytes) -> int:
    """How many of the first 20 lines that begin with print or exec and a word are statements of Python 2."""
    found = 0
    for match in itertools.islice(_PYTHON_2.finditer(raw), _FIRST):
        parent = root.descendant_for_byte_range(*match.span(1)).parent
        found += parent is not None and parent.type in ("print_statement", "exec_statement")
    return found
