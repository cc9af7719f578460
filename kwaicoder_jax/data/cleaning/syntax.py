"""Whether a text is what its language's grammar says, by how much of it the grammar finds no place for.

tree-sitter parses in bounded memory, without recursion and with recovery from errors. A share, not a yes or no: macros
and dialects break the grammar in places of files that are good. Languages without an installed grammar are not judged.
"""

import functools
import importlib
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
_PYTHON_2 = re.compile(r"\n[ \t]*+(?:print|exec)[ \t]++[^=\s]")  # a first look; the tree decides
_MOST_BYTES = 8_000_000  # tree-sitter's nodes take some ten times the text


class Faults(NamedTuple):
    """What the grammar says.

    Attributes:
      share: of the bytes, in errors but not in the whole statements within them; a missing sign is one byte. nan: unknown.
      python_2: print and exec statements.
    """

    share: float
    python_2: int = 0


UNKNOWN = Faults(math.nan)


class _Grammar(NamedTuple):
    parser: Any
    errors: Any  # a query
    statements: Any  # a query of Python 2's statements, or None


@functools.cache
def _grammar(language: str) -> _Grammar | None:
    module, function = _GRAMMARS[language]
    try:
        import tree_sitter

        capsule = getattr(importlib.import_module(module), function)()
    except ImportError:
        return None
    grammar = tree_sitter.Language(capsule)
    statements = "[(print_statement) (exec_statement)] @s" if language == "python" else ""
    return _Grammar(
        tree_sitter.Parser(grammar),
        tree_sitter.Query(grammar, "(ERROR) @error (MISSING) @missing"),
        tree_sitter.Query(grammar, statements) if statements else None,
    )


def known(language: str) -> bool:
    """Whether the language's grammar is installed."""
    return language in _GRAMMARS and _grammar(language) is not None


def check(text: str, language: str) -> Faults:
    """Parses the text; `UNKNOWN` without a grammar, or over 8 MB."""
    grammar = _grammar(language) if language in _GRAMMARS else None
    raw = text.encode()
    if grammar is None or len(raw) > _MOST_BYTES:
        return UNKNOWN
    parser, errors, statements = grammar
    root = parser.parse(raw).root_node
    old = 0
    if statements is not None and _PYTHON_2.search("\n" + text):
        old = len(_captures(statements, root).get("s", ()))
    if not root.has_error:
        return Faults(0.0, old)
    found = _captures(errors, root)
    lost = sum(_lost(node) for node in found.get("error", ())) + len(found.get("missing", ()))
    return Faults(min(1.0, lost / max(len(raw), 1)), old)


def _captures(query: Any, node: Any) -> dict[str, list[Any]]:
    import tree_sitter

    return tree_sitter.QueryCursor(query).captures(node)


def _lost(node: Any) -> int:
    """Bytes of an error outside the comments and the nodes of parts within it: those were understood, or are errors too."""
    whole = sum(
        child.end_byte - child.start_byte
        for child in node.children
        if child.is_extra or (child.is_named and child.child_count)
    )
    return node.end_byte - node.start_byte - whole
