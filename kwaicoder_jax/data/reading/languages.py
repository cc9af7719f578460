"""The language of a file: by its name, its first line, its content.

The table is short on purpose: what code is trained on, and the text and markup around it. A name is lower case, as in
"python", "cpp", "csharp", "shell"; `named` also knows the names that public data sets use (GitHub linguist's).
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

HEAD = 4096  # characters of a text that decide where the name does not


class Language(NamedTuple):
    """One row of the table.

    Attributes:
      name: ours.
      kind: "programming", "markup", "data" or "text".
      extensions: lower case, without the dot.
      files: whole file names, lower case.
      interpreters: of a first line that starts with "#!".
      others: other names of it, lower case.
    """

    name: str
    kind: str
    extensions: tuple[str, ...]
    files: tuple[str, ...] = ()
    interpreters: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


# name | extensions | file names | interpreters | other names
# fmt: off
_TABLES = {
    "programming": """
ada | adb ads
apl | apl dyalog
assembly | asm s nasm | | | unix assembly
awk | awk | | awk gawk mawk
batch | bat cmd | | | batchfile
c | c h
clojure | clj cljs cljc
cmake | cmake | cmakelists.txt
cobol | cob cbl cpy
coffeescript | coffee
common_lisp | lisp lsp cl asd | | sbcl | common lisp,lisp
coq | v | | | rocq prover
cpp | cc cpp cxx c++ hh hpp hxx h++ h ipp tpp inl tcc ino | | | c++
crystal | cr
csharp | cs csx | | | c#,c_sharp
cuda | cu cuh
cython | pyx pxd pxi
d | d di
dart | dart
dockerfile | dockerfile | dockerfile containerfile
elisp | el | | | emacs lisp
elixir | ex exs | | elixir
elm | elm
erlang | erl hrl | | escript
forth | fth 4th fs
fortran | f f77 f90 f95 f03 f08 for
fsharp | fs fsi fsx | | | f#
glsl | glsl vert frag geom comp fs | | | hlsl
go | go
gradle | gradle
graphql | graphql gql
groovy | groovy | jenkinsfile | groovy
haskell | hs lhs | | runhaskell
hcl | hcl tf tfvars | | | terraform
java | java
javascript | js jsx mjs cjs | jakefile | node nodejs | jsx
julia | jl | | julia
kotlin | kt kts
lean | lean | | | lean 4
lua | lua | | lua luajit
makefile | mk mak | makefile gnumakefile makefile.am makefile.in | make
matlab | m | | octave
meson | | meson.build meson_options.txt meson.options
nim | nim nims
nix | nix
objective_c | m mm h | | | objective-c,objectivec
ocaml | ml mli | | ocaml
pascal | pas pp dpr lpr
perl | pl pm t pod | makefile.pl | perl
php | php phtml php5 inc | | php | hack
powershell | ps1 psm1 psd1 | | pwsh
prolog | pl prolog | | swipl
protobuf | proto | | | protocol buffer
python | py pyi pyw | sconstruct sconscript wscript | python pypy | py
r | r | | rscript
racket | rkt | | racket
ruby | rb rake gemspec ru | rakefile gemfile podfile vagrantfile brewfile | ruby
rust | rs
scala | scala sc sbt | | scala
scheme | scm ss sld | | guile
shell | sh bash zsh ksh | configure.ac pkgbuild .bashrc .profile | sh bash zsh ksh dash | bash
smalltalk | st
solidity | sol
sql | sql ddl | | | plpgsql,plsql,tsql
starlark | bzl star | build build.bazel workspace workspace.bazel
swift | swift | | swift
systemverilog | sv svh
tcl | tcl | | tclsh wish
thrift | thrift
tsx | tsx
typescript | ts mts cts | | deno ts-node
vala | vala vapi
vb | vb vbs bas cls | | | visual basic,visual basic .net,vba
verilog | v vh
vhdl | vhd vhdl
vim_script | vim | .vimrc | | vim script,viml
wgsl | wgsl
yacc | y yy l ll | | | lex,bison
zig | zig""",
    "markup": """
asciidoc | adoc asciidoc
css | css
html | html htm xhtml | | | html+erb,html+django
jinja | j2 jinja jinja2
jupyter | ipynb | | | jupyter notebook
less | less
markdown | md markdown mdx rmd qmd | | | rmarkdown
org | org
rst | rst rest | | | restructuredtext
scss | scss sass
svelte | svelte
svg | svg
tex | tex sty cls dtx bib
texinfo | texi texinfo
troff | man mdoc | | | roff
vue | vue
xml | xml xsd xsl xslt xaml csproj vcxproj props targets rng wsdl plist ts""",
    "data": """
csv | csv tsv
diff | diff patch
gettext | po pot | | | gettext catalog
ini | ini cfg conf properties editorconfig desktop service | .editorconfig .gitconfig setup.cfg tox.ini
json | json jsonc json5 geojson webmanifest | .eslintrc .babelrc .prettierrc | | json with comments
toml | toml | cargo.lock poetry.lock pipfile
yaml | yaml yml | .clang-format .clang-tidy""",
    "text": """
text | txt text | readme changelog changes news authors contributors install todo requirements.txt \
copying license licence notice""",
}
# fmt: on


def _rows() -> list[Language]:
    rows = []
    for kind, table in _TABLES.items():
        for line in table.strip().splitlines():
            cells = [cell.strip() for cell in (line + "||||").split("|")]
            words = [tuple(cell.split()) for cell in cells[1:4]]
            others = tuple(filter(None, cells[4].split(",")))
            rows.append(Language(cells[0], kind, words[0], words[1], words[2], others))
    return rows


LANGUAGES: dict[str, Language] = {row.name: row for row in _rows()}
_BY_FILE = {file: row.name for row in LANGUAGES.values() for file in row.files}
_BY_INTERPRETER = {word: row.name for row in LANGUAGES.values() for word in row.interpreters}
_BY_NAME = {other: row.name for row in LANGUAGES.values() for other in (row.name, *row.others)}
_BY_EXTENSION: dict[str, tuple[str, ...]] = {}
for _row in LANGUAGES.values():
    for _extension in _row.extensions:
        _BY_EXTENSION[_extension] = (*_BY_EXTENSION.get(_extension, ()), _row.name)

_SHEBANG = re.compile(r"#!\s*(?:\S*/)?(?:env\s+(?:-\S+\s+|\w+=\S*\s+)*(?:\S*/)?)?([A-Za-z-]+)")
_MODE = re.compile(r"(?:.*\n)?.*?-\*-[ \t]*(?:.*?\bmode:[ \t]*)?([\w+#-]+?)[ \t]*(?:;.*?)?-\*-", re.IGNORECASE)  # Emacs
_OPENINGS = (
    (re.compile(r"<\?php\b"), "php"),
    (re.compile(r"\s*<!doctype html|\s*<html[\s>]", re.IGNORECASE), "html"),
    (re.compile(r"\s*<\?xml\s"), "xml"),
    (re.compile(r"diff --git |--- \S+.*\n\+\+\+ \S"), "diff"),
)


def _pattern(expression: str) -> re.Pattern[str]:
    return re.compile(expression, re.MULTILINE)


_OBJECTIVE_C = _pattern(r"^\s*(?:@(?:interface|implementation|protocol|class|end|property|import)\b|#\s*import\b)")
_CPP = _pattern(
    r"^\s*(?:class\s+\w[^;(]*\{|class\s+(?:\w+\s+)?\w+\s*(?:final\s*)?[:{;]|namespace\b|template\s*<|using\s+(?:namespace\b|\w+\s*=|\w+::)|"
    r"(?:public|private|protected)\s*:|#\s*include\s*<(?:\w+|c\w+)>)|\b(?:std|boost)::|\bconstexpr\b|\bnullptr\b|"
    r"\boperator\s*(?:[=<>+*/!-]{1,2}|\(\)|\[\])\s*\(|\bvirtual\s+[\w:<>*&~ ]+\(|\bstatic_cast<"
)
_PROLOG = _pattern(r"^\s*:-\s|^[a-z]\w*(?:\([^\n]*\))?\s*:-|-->")
_PERL = _pattern(
    r"^\s*(?:use\s+(?:strict|warnings|\w+::|v?5)|package\s+[\w:]+\s*;|sub\s+\w+|my\s+[$@%(])|^=(?:head|pod)"
)
# What to try for an extension of several languages, in order, and what it is when nothing matches.
_DECISIONS: dict[str, tuple[tuple[tuple[re.Pattern[str], str], ...], str]] = {
    "h": (((_OBJECTIVE_C, "objective_c"), (_CPP, "cpp")), "c"),
    "m": (((_OBJECTIVE_C, "objective_c"), (_pattern(r"^\s*#\s*include\b|^\s*//"), "objective_c")), "matlab"),
    "pl": (((_PERL, "perl"), (_PROLOG, "prolog")), "perl"),
    "ts": (((_pattern(r"\A\s*(?:<\?xml|<!DOCTYPE TS)"), "xml"),), "typescript"),
    "v": (((_pattern(r"^\s*(?:Require|Theorem|Lemma|Inductive|Definition|Proof)\b"), "coq"),), "verilog"),
    "fs": (
        (
            (_pattern(r"^\s*(?:#version|uniform|varying|precision)\b|\bgl_FragColor\b"), "glsl"),
            (_pattern(r"^\s*: \w+|^\s*\\ "), "forth"),
        ),
        "fsharp",
    ),
    "cls": (((_pattern(r"^\s*(?:%|\\(?:Provides|NeedsTeX|Load|def|new))"), "tex"),), "vb"),
}


def named(name: str) -> str:
    """Returns our name for a language as a data set calls it, as in "c++" or "Jupyter Notebook"; "" if unknown."""
    return _BY_NAME.get(name.strip().lower(), "")


@functools.lru_cache(maxsize=65536)
def candidates(path: str) -> tuple[str, ...] | None:
    """What a file may be by its name alone: languages, () for a name that is known to be none, None for no hint."""
    file = path.rsplit("/", 1)[-1].lower()
    if file in _BY_FILE:
        return (_BY_FILE[file],)
    if file.startswith(("dockerfile.", "makefile.")):
        return (file.split(".", 1)[0],)
    stem, dot, extension = file.removesuffix(".in").rpartition(".")
    if not dot or not stem:
        return None if not file.startswith(".") else ()
    return _BY_EXTENSION.get(extension, ())


def language_of(path: str, text: str) -> str:
    """Returns the language of a file, or "" where neither its name nor its content tells.

    Args:
      path: with "/"; may be empty.
      text: its beginning at least; only the first `HEAD` characters count.
    """
    found = candidates(path) if path else None
    head = text[:HEAD]
    if found is None:
        return _by_content(head)
    if len(found) > 1:
        if (mode := _mode(head)) in found:
            return mode
        extension = path.lower().removesuffix(".in").rpartition(".")[2]
        decisions, otherwise = _DECISIONS.get(extension, ((), found[0]))
        return next((name for pattern, name in decisions if pattern.search(head)), otherwise)
    return found[0] if found else ""


def _mode(head: str) -> str:
    match = _MODE.match(head)
    return named(match[1]) if match else ""


def _by_content(head: str) -> str:
    if match := _SHEBANG.match(head):
        return _BY_INTERPRETER.get(match[1].lower(), "")
    if mode := _mode(head):
        return mode
    return next((name for pattern, name in _OPENINGS if pattern.match(head)), "")


_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b\x1a")) + b"\x7f"
_MAGIC = (
    *(b"%PDF-", b"\x7fELF", b"PK\x03\x04", b"\x1f\x8b", b"\x89PNG", b"GIF8", b"\xff\xd8\xff", b"BZh", b"\xfd7zXZ"),
    *(b"\x28\xb5\x2f\xfd", b"\xca\xfe\xba\xbe", b"wOFF", b"wOF2", b"!<arch>\n", b"OggS", b"RIFF", b"SQLite format 3"),
)


def is_binary(raw: bytes) -> bool:
    """Whether bytes are no text: a known magic number, NUL bytes without a UTF-16/32 mark, or many control bytes."""
    head = raw[: 2 * HEAD]
    if head.startswith(_MAGIC):
        return True
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return False
    return b"\0" in head or len(head) - len(head.translate(None, _CONTROL)) > 0.02 * len(head)


@functools.lru_cache(maxsize=1)
def _identify() -> Callable[[bytes], str]:
    from kwaicoder_jax.errors import UserError

    try:
        import magika
    except ImportError as error:
        raise UserError(
            "magika is not installed", where="prepare_data.reading.guess_languages", remedy="pip install magika"
        ) from error
    model = magika.Magika()
    return lambda raw: str(model.identify_bytes(raw).output.label)


def guessed(raw: bytes) -> str:
    """What Google's magika (a small model, optional) says of content whose name tells nothing; "" if not in the table.

    Raises:
      UserError: magika is not installed.
    """
    return named({"txt": "text", "cs": "csharp", "objectivec": "objective_c"}.get(label := _identify()(raw), label))
