"""Licence and copyright banners at the top of files: taken away, or shortened to one line; all else stays as it is."""

import re
from typing import NamedTuple

from kwaicoder_jax.data.cleaning.characters import names

HANDLING = ("keep", "shorten", "remove")

_LEGAL = re.compile(
    r"copyright|\(c\) *(?:19|20)\d\d|©|licen[cs]e|spdx|all rights reserved|permission (?:is|to use)|redistribut|warrant"
    r"|merchantab|public domain|in no event|liab(?:le|ility)|as is\b|you may obtain a copy|applicable law"
    r"|free software|neither the name|without (?:limitation|restriction)|see the (?:notice|copying)|damages"
    r"|conditions are met|following (?:conditions|disclaimer)|you should have received",
    re.IGNORECASE,
)
_BEGINS = re.compile(r"copyright|licen[cs]e|spdx|all rights reserved|public domain|©", re.IGNORECASE)
_KEPT_LINE = re.compile(
    r"#!|<\?(?:php|xml)|<!doctype|['\"]use strict['\"]|.{0,10}-\*-|.{0,10}\bcoding[:=]|[#/*; ]*(?:vim?:|ex:|pylint:|flake8:|"
    r"mypy:|type:|ruff:|noqa|isort:|yapf:|fmt:|cython:|distutils:|frozen_string_literal|eslint|jshint|tslint|global "
    r"|@flow|@ts-|<reference|go:build|\+build|@charset|shellcheck|nolint|clang-format|syntax=)",
    re.IGNORECASE,
)
_LETTERS = re.compile(r"[^\W\d_]")
_BLOCKS = 6  # comments that are looked at, at most
_LONGEST = 20_000  # characters; the GPL's whole text is longer, and no banner
_LEAST = 12  # letters; what is left of a banner with fewer says nothing

_SLASHES = names(
    "c cpp csharp objective_c cuda java javascript typescript tsx go rust php swift kotlin scala dart groovy gradle d "
    "verilog systemverilog glsl wgsl protobuf solidity thrift vala scss less zig css yacc"
)
_HASHES = names(
    "python cython shell perl ruby r yaml toml makefile dockerfile cmake elixir julia nim nix awk tcl powershell "
    "starlark hcl meson crystal graphql php"
)
_LINE_SIGNS = {"haskell": "--", "lua": "--", "sql": "--", "ada": "--", "elm": "--", "vhdl": "--"}
_LINE_SIGNS |= dict.fromkeys(names("tex matlab erlang prolog"), "%")
_LINE_SIGNS |= dict.fromkeys(names("common_lisp elisp clojure scheme racket assembly ini"), ";")


class _Comment(NamedTuple):
    end: int
    opening: str
    body: str
    closing: str


def strip(text: str, language: str, licence: str = "", handling: str = "remove") -> tuple[str, int]:
    """Takes the banners away from the comments before the first line of code.

    What a comment says beside the banner stays, by paragraphs; so do "#!" lines, encodings and directives to tools.

    Args:
      text: a whole file.
      language: a name of `reading.languages`; others than those with known comments are left alone.
      licence: SPDX identifier, for "shorten".
      handling: "keep", "shorten" (to the licence's identifier, where it is known) or "remove".

    Returns:
      the text, and how many banners were taken away.
    """
    if handling == "keep":
        return text, 0
    kept: list[str] = []
    place, banners = 0, 0
    for _ in range(_BLOCKS):
        blank = re.compile(r"(?:[ \t]*\n)*").match(text, place)
        start = blank.end() if blank else place
        line_end = text.find("\n", start) + 1 or len(text)
        if _KEPT_LINE.match(text, start, line_end):
            kept.append(text[place:line_end])
            place = line_end
            continue
        comment = _comment(text, start, language)
        if comment is None:
            break
        if _BEGINS.search(comment.body) and len(comment.body) <= _LONGEST:
            banners += 1
            if left := _without_banner(comment):
                kept += [text[place:start], left]
        else:
            kept.append(text[place : comment.end])
        place = comment.end
    if not banners:
        return text, 0
    rest = text[place:] if "".join(kept).strip() else text[place:].lstrip("\n")
    sign = _sign(language)
    if handling == "shorten" and licence and sign:
        first = 1 if kept and kept[0].startswith("#!") else 0
        opening, closing = sign
        kept.insert(first, f"{opening} SPDX-License-Identifier: {licence}{closing}\n")
    return "".join(kept) + rest, banners


def _sign(language: str) -> tuple[str, str] | None:
    if language == "css":
        return "/*", " */"
    if language == "php":
        return None  # before "<?php" it would be text
    if language in _SLASHES:
        return "//", ""
    sign = "#" if language in _HASHES else _LINE_SIGNS.get(language)
    return (sign, "") if sign else None


def _comment(text: str, start: int, language: str) -> _Comment | None:
    """The comment that begins at `start`, to the end of its last line; None if code stands there or beside it."""
    if language in _SLASHES and text.startswith("/*", start):
        return _block(text, start, re.compile(r"[ \t]*/\*[*!]*"), "*/")
    if language in ("html", "xml", "markdown", "svg", "vue", "svelte") and text.startswith("<!--", start):
        return _block(text, start, re.compile(r"<!--"), "-->")
    signs = {
        "//": language in _SLASHES,
        "#": language in _HASHES,
        _LINE_SIGNS.get(language, ""): language in _LINE_SIGNS,
    }
    for sign in (sign for sign, used in signs.items() if used):
        lines = re.compile(rf"(?:[ \t]*{re.escape(sign)}[^\n]*(?:\n|\Z))+").match(text, start)
        if lines:
            return _Comment(lines.end(), "", lines[0], "")
    return None


def _block(text: str, start: int, opening: re.Pattern[str], closing: str) -> _Comment | None:
    first = opening.match(text, start)
    stop = text.find(closing, start + 2)
    if first is None or stop < first.end():
        return None
    end = text.find("\n", stop) + 1 or len(text)
    if text[stop + len(closing) : end].strip():
        return None
    return _Comment(end, first[0], text[first.end() : stop], text[stop:end])


def _without_banner(comment: _Comment) -> str:
    """The comment without the paragraphs that speak of rights; "" if little is left."""
    paragraphs: list[list[str]] = [[]]
    for line in comment.body.splitlines(keepends=True):
        if not _LETTERS.search(line):
            paragraphs.append([])
        paragraphs[-1].append(line)
    kept, directives = [], False
    for paragraph in paragraphs:
        legal = _LEGAL.search("".join(paragraph))
        for line in paragraph:
            directive = bool(_KEPT_LINE.match(line.lstrip()))
            directives |= directive
            kept += [line] if directive or not legal else []
    body = "".join(kept)
    if len(_LETTERS.findall(body)) < _LEAST and not directives:
        return ""
    if not comment.opening:
        return body
    if not body.startswith((" ", "\n", "\t")):
        body = " " + body
    tail = body.rpartition("\n")[2]
    return comment.opening + body + ("" if tail.strip() or body.endswith((" ", "\n")) else " ") + comment.closing
