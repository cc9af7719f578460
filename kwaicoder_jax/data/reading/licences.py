"""Licences: which one holds for a file of a repository, and whether it is allowed.

What is found is a claim, not advice. What is not recognised is unknown.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from email.parser import BytesHeaderParser

from kwaicoder_jax.data.reading.licence_texts import OPERATOR, of_name, of_text

LICENCE_FILE = re.compile(
    r"(?:un)?licen[cs]es?(?:[-._].*)?|copying(?:[-._].*)?|copyright(?:\.\w+)?|(?:mit|apache|bsd|gpl|lgpl)-licen[cs]e(?:\.\w+)?"
    r"|licen[cs]e-\w+|\w+[-.]licen[cs]e(?:\.txt|\.md)?", re.IGNORECASE
)  # fmt: skip
RECORD = ".dist-info/RECORD"
_CODE = re.compile(r"\.(?:py|pyi|c|h|cc|cpp|js|ts|go|rs|rb|java|php|sh|html?|json|ya?ml|toml)$", re.IGNORECASE)


def is_licence_file(path: str) -> bool:
    """Whether a file's name is that of a licence's text, as in "LICENSE", "COPYING.LESSER", "licenses/MIT.txt"."""
    *folders, file = path.split("/")
    if _CODE.search(file):
        return False
    in_folder = bool(folders) and folders[-1].lower() in ("licenses", "licences")
    return in_folder or LICENCE_FILE.fullmatch(file) is not None


def _of_python(raw: bytes) -> str:
    headers = BytesHeaderParser().parsebytes(raw.split(b"\n\n", 1)[0])
    if found := of_name(str(headers.get("License-Expression") or "")):
        return found
    classifiers = [str(value).split(" :: ") for value in headers.get_all("Classifier") or ()]
    names = [parts[-1] for parts in classifiers if parts[0] == "License" and len(parts) > 1]
    found = " AND ".join(sorted({of_name(name) for name in names} - {""}))
    named = of_name(str(headers.get("License") or ""))
    return named or found


def _of_npm(raw: bytes) -> str:
    value = json.loads(raw)
    licence = value.get("license") if isinstance(value, dict) else None
    return of_name(
        licence.get("type", "") if isinstance(licence, dict) else licence if isinstance(licence, str) else ""
    )


def _of_toml(raw: bytes) -> str:
    import tomllib

    value = tomllib.loads(raw.decode())
    table = value.get("package") or value.get("project") or {}
    licence = table.get("license", "")
    name = licence.get("text", "") if isinstance(licence, dict) else licence if isinstance(licence, str) else ""
    return of_name(name.replace("/", " OR "))


_METADATA: Mapping[str, Callable[[bytes], str]] = {
    **{"PKG-INFO": _of_python, "METADATA": _of_python, "package.json": _of_npm},
    **{"Cargo.toml": _of_toml, "pyproject.toml": _of_toml},
}


def is_metadata_file(path: str) -> bool:
    """Whether a file tells a package's licence, as PKG-INFO, METADATA, package.json, Cargo.toml, or whose it is (RECORD)."""
    return path.rsplit("/", 1)[-1] in _METADATA or path.endswith(RECORD)


def of_metadata(path: str, raw: bytes) -> str:
    """The licence that a metadata file names, "" where it names none or is broken."""
    try:
        return _METADATA[path.rsplit("/", 1)[-1]](raw)
    except (ValueError, TypeError, AttributeError, RecursionError, UnicodeError):
        return ""


def owners(records: Mapping[str, bytes]) -> dict[str, str]:
    """Which "X.dist-info" speaks for a folder or module beside it, by the RECORD files of Python's installed packages.

    Args:
      records: contents by path, as in {"flask-3.1.0.dist-info/RECORD": b"flask/app.py,sha256=...,1\\n..."}.
    """
    found: dict[str, str] = {}
    for path, raw in sorted(records.items()):
        folder = path.rpartition("/")[0]
        beside = folder.rpartition("/")[0]
        for line in raw.decode("utf-8", "replace").splitlines():
            top = line.split(",", 1)[0].strip('"').split("/", 1)[0]
            if top and not top.endswith(".dist-info") and top not in ("..", "."):
                found.setdefault(f"{beside}/{top}" if beside else top, folder)
    return found


class Finder:
    """Which licence holds for a file of a repository: that of the nearest folder above it that has one.

    Args:
      texts: licence files by path, decoded.
      metadata: metadata files by path, in bytes; they speak where no licence file above does.
    """

    def __init__(self, texts: Mapping[str, str], metadata: Mapping[str, bytes]):
        records = {path: raw for path, raw in metadata.items() if path.endswith(RECORD)}
        self._texts = _by_folder({path: of_text(text) for path, text in texts.items()})
        self._metadata = _by_folder(
            {path: of_metadata(path, raw) for path, raw in metadata.items() if path not in records}
        )
        self._owners = owners(records)

    def of(self, path: str) -> str:
        """Returns the SPDX expression for a file, "" where nothing is known."""
        above = [path[:at] for at in range(len(path)) if path[at] == "/"]
        for name in (path, *reversed(above), ""):
            if name in self._texts and name != path:
                return self._texts[name]
            if (owner := self._owners.get(name)) and (found := self._metadata.get(owner) or self._texts.get(owner)):
                return found
        return next((self._metadata[name] for name in (*reversed(above), "") if name in self._metadata), "")


def _by_folder(found: Mapping[str, str]) -> dict[str, str]:
    folders: dict[str, set[str]] = {}
    for path, name in found.items():
        folder = path.rpartition("/")[0]
        head, _, last = folder.rpartition("/")
        if last.lower() in ("licenses", "licences"):
            folder = head
        if name:
            folders.setdefault(folder, set()).update(name.split(" AND ") if "OR" not in name else [f"({name})"])
    joined = {folder: " AND ".join(sorted(names)) for folder, names in folders.items()}
    return {
        folder: name[1:-1] if name.startswith("(") and " AND " not in name else name for folder, name in joined.items()
    }


def allowed(expression: str, licences: Collection[str]) -> bool:
    """Whether an SPDX expression can be met with the licences: all sides of an AND, any side of an OR.

    "-only", "-or-later" and "+" do not matter; an exception after WITH only adds rights.
    """
    tokens = [part for part in OPERATOR.split(expression) if part]

    def either() -> bool:
        value = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = both() or value
        return value

    def both() -> bool:
        value = single()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = single() and value
        return value

    def single() -> bool:
        if not tokens:
            return False
        token = tokens.pop(0)
        if token == "(":
            value = either()
            if tokens:
                tokens.pop(0)
            return value
        if tokens[:1] == ["WITH"]:
            del tokens[:2]
        name = token.removesuffix("-only").removesuffix("-or-later").removesuffix("+")
        return name in licences or token in licences

    return bool(tokens) and len(expression) < 1000 and either() and not tokens
