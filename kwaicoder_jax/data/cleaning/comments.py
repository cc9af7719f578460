"""Where the comments and the strings of a text lie, by the language's lexical syntax.

One compiled expression a syntax, whose alternatives begin with a literal, so that `re` skips to the next of them at
the speed of memory, and which always match, to the end of the line or text if need be: no text takes more than one pass.
"""

import re
from typing import NamedTuple

import numpy as np

_INDENT = 100  # characters; a string further in is not a docstring
_LINE_STRINGS = r""""[^"\\\n]*+(?:\\[\s\S][^"\\\n]*+)*+"?|'[^'\\\n]*+(?:\\[\s\S][^'\\\n]*+)*+'?"""
_QUOTED_CHARACTERS = r""""[^"\\]*+(?:\\[\s\S][^"\\]*+)*+"?|'(?:[^'\\\n]|\\[^'\n]{1,10})'"""
_DOUBLED = r"""'[^']*+'?|"[^"\n]*+"?"""  # SQL: a quote is written twice, and both halves are strings
_BACKTICKS = r"`[^`\\]*+(?:\\[\s\S][^`\\]*+)*+`?"
_TRIPLE = r'"""(?:[^"\\]|\\[\s\S]|"(?!""))*+(?:"""|\Z)|' + r"'''(?:[^'\\]|\\[\s\S]|'(?!''))*+(?:'''|\Z)"
_BLOCK = r"/\*[^*]*+(?:\*(?!/)[^*]*+)*+(?:\*/|\Z)"
_SLASHES = r"//[^\n]*+"
_HASH = r"#[^\n]*+"
_HASH_AFTER_SPACE = r"#(?<!\S#)[^\n]*+"  # a # inside a word is none in shells


def _syntax(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(filter(None, alternatives)))  # no groups: `re` would not see the literals in them


_C = _syntax(f"{_SLASHES}|{_BLOCK}", _LINE_STRINGS)
_SCRIPT = _syntax(f"{_SLASHES}|{_BLOCK}", f"{_LINE_STRINGS}|{_BACKTICKS}")
_TRIPLE_C = _syntax(f"{_SLASHES}|{_BLOCK}", f"{_TRIPLE}|{_LINE_STRINGS}")
_HASHED = _syntax(_HASH_AFTER_SPACE, _LINE_STRINGS)
_DASHES = _syntax(r"--[^\n]*+|\{-[^-]*+(?:-(?!\})[^-]*+)*+(?:-\}|\Z)", r'"[^"\\\n]*+(?:\\[\s\S][^"\\\n]*+)*+"?')
_MARKUP = _syntax(r"<!--[^-]*+(?:-(?!->)[^-]*+)*+(?:-->|\Z)")
_PERCENT = _syntax(r"%(?<!\\%)[^\n]*+")
_SEMICOLON = _syntax(r";[^\n]*+", r'"[^"\\]*+(?:\\[\s\S][^"\\]*+)*+"?')

_SYNTAXES: dict[str, re.Pattern[str]] = {
    "python": _syntax(_HASH, f"{_TRIPLE}|{_LINE_STRINGS}"),
    "cython": _syntax(_HASH, f"{_TRIPLE}|{_LINE_STRINGS}"),
    "julia": _syntax(_HASH, f"{_TRIPLE}|{_LINE_STRINGS}"),
    "json": _syntax(r'"[^"\\\n]*+(?:\\[\s\S][^"\\\n]*+)*+"?'),
    "lua": _syntax(r"--\[\[[^\]]*+(?:\](?!\])[^\]]*+)*+(?:\]\]|\Z)|--[^\n]*+", _LINE_STRINGS),
    "php": _syntax(f"{_SLASHES}|{_BLOCK}|#(?!\\[)[^\n]*+", _LINE_STRINGS),
    "rust": _syntax(f"{_SLASHES}|{_BLOCK}", _QUOTED_CHARACTERS),
    "sql": _syntax(rf"--[^\n]*+|{_BLOCK}", _DOUBLED),
    "css": _syntax(_BLOCK, _LINE_STRINGS),
}
for _names, _pattern in {
    "c cpp csharp objective_c cuda java d verilog systemverilog glsl wgsl protobuf solidity thrift vala yacc": _C,
    "javascript typescript tsx go vue svelte scss less zig": _SCRIPT,
    "kotlin scala swift dart groovy gradle": _TRIPLE_C,
    "shell perl ruby r yaml toml makefile dockerfile cmake elixir nim nix awk tcl powershell starlark hcl meson": _HASHED,
    "crystal graphql": _HASHED,
    "haskell ada vhdl elm": _DASHES,
    "html xml markdown svg": _MARKUP,
    "tex matlab erlang prolog": _PERCENT,
    "common_lisp elisp clojure scheme racket assembly ini": _SEMICOLON,
}.items():
    _SYNTAXES |= dict.fromkeys(_names.split(), _pattern)


class Spans(NamedTuple):
    """Where each piece begins and has ended, in characters, as arrays; the pieces of a kind do not overlap."""

    comment_starts: np.ndarray
    comment_ends: np.ndarray
    string_starts: np.ndarray
    string_ends: np.ndarray

    def comments(self) -> int:
        """Characters in comments."""
        return int((self.comment_ends - self.comment_starts).sum())

    def strings(self) -> int:
        """Characters in strings, with their quotes."""
        return int((self.string_ends - self.string_starts).sum())


def spans(text: str, language: str) -> Spans | None:
    """Returns the comments and strings; None for a language whose syntax is not known.

    A Python string in three quotes at the start of a line is a docstring, and counts as a comment.
    """
    pattern = _SYNTAXES.get(language)
    if pattern is None:
        return None
    docstrings = language == "python"
    comments: list[tuple[int, int]] = []
    strings: list[tuple[int, int]] = []
    for match in pattern.finditer(text):
        start = match.start()
        quoted = text[start] in "\"'`" and not (docstrings and _is_docstring(text, start))
        (strings if quoted else comments).append(match.span())
    pairs = [np.array(found, np.int64).reshape(-1, 2).T for found in (comments, strings)]
    return Spans(pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1])


def _is_docstring(text: str, start: int) -> bool:
    if text[start : start + 3] not in ('"""', "'''"):
        return False
    _, newline, indent = text[max(0, start - _INDENT) : start].rpartition("\n")
    return bool(newline or start < _INDENT) and indent.strip().lower() in ("", "r", "u")
