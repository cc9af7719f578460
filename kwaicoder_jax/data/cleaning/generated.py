"""Code that nobody wrote: made by a program, locked, minified, bundled. By marks and names that say so, not by guesses."""

import re

from kwaicoder_jax.data.cleaning import comments
from kwaicoder_jax.data.cleaning.characters import names
from kwaicoder_jax.data.cleaning.statistics import Statistics

NAMES = ("generated", "lock_file", "minified", "source_map", "bundle", "mislabelled_xml")
_HEAD = 3000  # characters; a mark further down speaks of a part
_BY = r"(?:by|from|with|using|via|through|automatically|on|at)\b"
_WHAT = r"(?:file|code|module|header|source|class|interface|script|program|parser|lexer|bindings?|stubs?|documentation)"
# A sentence's beginning: a capital, or the beginning of a block comment; a line can go on with any small word.
_START = r"(?:(?:^|[.!][ ])[^\w\n@]*(?=(?-i:[A-Z]))|/\*+[ ]*)"
_TOOL = r"(?:auto(?:conf|make|header)|aclocal|libtool|cmake|qmake|swig|cython|bison|flex|antlr|protoc|gperf|ragel|f2py)"
_MARKS = re.compile(
    rf"""@generated\b
    | \bDO[ ]NOT[ ](?:EDIT|MODIFY|CHANGE)\b
    | \bdo[ ]not[ ](?:edit|modify)[ ](?:(?:this|the)[ ]file\b|it[ ]by\b|by[ ]hand|manually|directly)
    | \b(?:this[ ]{_WHAT}|file)[ ](?:is|was|has[ ]been)[ ](?!not\b)(?:\w+[ ])?(?:auto-?)?generated\b
    | {_START}(?:(?:this|the)[ ])?(?:{_WHAT}[ ])?(?:(?:auto(?:matically)?|machine)[- ]?)?generated(?:[ ]{_WHAT})?[ ]{_BY}
    | {_START}(?:(?:this|the)[ ])?(?:auto|machine)[- ]?generated[ ]{_WHAT}\b
    | ^[^\w\n@]*(?:auto|machine)[- ]?generated[^\w\n]*$
    | \b(?:this|the)[ ]{_WHAT}[ ](?:is|was)[ ]an?[ ](?:auto[- ]?|machine[- ]?|automatically[ ])?generated\b
    | ^[^\w\n]*[\w./-]+[ ]generated[ ](?:automatically[ ])?by[ ](?:GNU[ ])?{_TOOL}
    | \bA[ ](?:Bison[ ]parser,[ ]made[ ]by|lexical[ ]scanner[ ]generated[ ]by[ ]flex)
    | \bGenerated[ ]by[ ]the[ ]protocol[ ]buffer[ ]compiler""",
    re.MULTILINE | re.VERBOSE | re.IGNORECASE,
)
_SHOUTED = re.compile(r"\bdo not (?:edit|modify|change)\b", re.IGNORECASE)  # counts alone only in capitals
_COMMENT_LINE = re.compile(r"^[ \t]*(?:#|//|/?\*|;|--|%|<!--|\"|!|dnl\b|\.\\\")[^\n]*", re.MULTILINE)

_LOCK_FILES = names(
    "package-lock.json npm-shrinkwrap.json yarn.lock pnpm-lock.yaml bun.lock composer.lock gemfile.lock cargo.lock "
    "poetry.lock pdm.lock uv.lock pipfile.lock podfile.lock package.resolved cartfile.resolved go.sum mix.lock "
    "pubspec.lock packages.lock.json brewfile.lock.json flake.lock gradle.lockfile .terraform.lock.hcl"
)
_GENERATED_NAMES = re.compile(
    r"(?:_pb2(?:_grpc)?\.pyi?|\.pb\.(?:go|cc|h|c|swift|dart)|_pb\.(?:js|rb|d\.ts)|\.pb-c\.[ch]|\.g\.(?:cs|dart)"
    r"|\.designer\.(?:cs|vb)|\.freezed\.dart|(?:^|/)zz_generated\.[\w.]+|\.generated\.\w+|\.tab\.[ch]|(?:^|/)lex\.yy\.c"
    r"|(?:^|/)r\.java|(?:^|/)buildconfig\.java|(?:^|/)aclocal\.m4|(?:^|/)moc_\w+\.cpp|(?:^|/)qrc_\w+\.cpp|_rc\.py)$"
)
_MINIFIED_NAMES = re.compile(r"[.-](?:min|bundle|packed)(?:\.\w{4,20})?\.(?:m?js|css)$|\.chunk\.(?:js|css)$")
_LIBRARIES = re.compile(
    r"(?:^|/)(?:jquery|bootstrap|angular|react(?:-dom)?|vue|d3|lodash|underscore|moment|three|ember|backbone|modernizr"
    r"|prototype|mootools|raphael|highcharts|ckeditor|tinymce|codemirror)(?:[-.](?:all|core|full|slim|ui|\d[\d.]*))*"
    r"\.(?:m?js|css)$|(?:^|/)(?:node_modules|bower_components)/"
)
_BUNDLERS = (
    *("__webpack_require__", "webpackJsonp", "webpackChunk", "__esModule = true, __toESM", "parcelRequire"),
    *("//# sourceMappingURL=", "//@ sourceMappingURL=", "/*# sourceMappingURL=", "$jscomp"),
)
_COMPACT = frozenset({"javascript", "css", "typescript", "json", "html"})


def broken(path: str, text: str, language: str, statistics: Statistics) -> tuple[str, ...]:
    """Returns which of `NAMES` a document is.

    Args:
      path: of the file; empty where it has none.
      text: as it was found, with its header.
      language: a name of `reading.languages`, or "".
      statistics: of the text.
    """
    name = path.lower()
    found = {
        "generated": bool(_GENERATED_NAMES.search(name)) or is_marked(text, language),
        "lock_file": name.rpartition("/")[2] in _LOCK_FILES,
        "minified": bool(_MINIFIED_NAMES.search(name)) or _is_minified(language, statistics),
        "source_map": name.endswith(".map") or _is_source_map(text),
        "bundle": bool(_LIBRARIES.search(name)) or (language in _COMPACT and any(mark in text for mark in _BUNDLERS)),
        "mislabelled_xml": "<?xml version=" in text[:100] and language not in ("xml", "svg", "html", "xsl"),
    }
    return tuple(rule for rule, yes in found.items() if yes)


def is_marked(text: str, language: str) -> bool:
    """Whether a comment near the top says that a program wrote the file."""
    head = text[:_HEAD]
    if "enerated" not in head and "NOT " not in head and "not edit" not in head and "GENERATED" not in head:
        return any(mark in head for mark in ("not modify", "A Bison parser")) and _says_so(head, language)
    return _says_so(head, language)


def _says_so(head: str, language: str) -> bool:
    spans = comments.spans(head, language)
    if spans is None or language in ("markdown", "html", "xml"):
        said = [match[0] for match in _COMMENT_LINE.finditer(head)]
    else:
        said = [head[a:b] for a, b in zip(spans.comment_starts, spans.comment_ends, strict=True)]
    for match in _MARKS.finditer("\n".join(said)):
        shouted = _SHOUTED.fullmatch(match[0])
        if not shouted or match[0].isupper():
            return True
    return False


def _is_minified(language: str, statistics: Statistics) -> bool:
    if language not in ("javascript", "css", "typescript") or statistics.characters < 500:
        return False
    return statistics.white_space < 0.05 or (statistics.white_space < 0.1 and statistics.mean_line > 80)


def _is_source_map(text: str) -> bool:
    head = text[:300].lstrip()
    return head.startswith("{") and '"version":' in head[:100] and '"mappings"' in text
