"""Text that every Python installation carries: its library and packages, and what they say of themselves."""

import ast
import dataclasses
import sysconfig
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path, PurePosixPath

from kwaicoder_jax.data.sources import Document, Entry, Source, reader, select

# Tests are repetitive and hold golden data; vendored copies repeat other packages; encodings are generated tables.
# fmt: off
_SKIPPED_FOLDERS = frozenset({
    "test", "tests", "testing", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings", "pydoc_data",
    "ensurepip", "site-packages", "dist-packages", "_vendor", "_vendored", "vendor", "vendored", "third_party",
    "benchmarks",
})
# fmt: on
_SHORTEST_DOCSTRING = 60  # characters; shorter ones say what the name says
_SHORTEST_KNOWLEDGE = 300  # characters a document


def _wanted(path: PurePosixPath) -> bool:
    if path.suffix != ".py" or ".." in path.parts or _SKIPPED_FOLDERS.intersection(path.parts[:-1]):
        return False
    stem = path.stem
    generated = stem.endswith(("_pb2", "_pb2_grpc")) or stem.startswith(("__editable__", "_sysconfigdata"))
    return not (generated or stem == "conftest" or stem.startswith("test_") or stem.endswith("_test"))


def _standard_library() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in root.rglob("*.py"):
        relative = PurePosixPath(path.relative_to(root).as_posix())
        if _wanted(relative):
            yield str(relative), path


def _distributions() -> Iterator[tuple[str, metadata.Distribution]]:
    seen: set[str] = set()
    for distribution in metadata.distributions():  # the first of a name on the path is the one that is imported
        name = distribution.metadata["Name"]
        if name and name.lower() not in seen:
            seen.add(name.lower())
            yield name, distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary(Source):
    """Python files of the running interpreter's standard library."""

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one document a module, named by its path below the library, as in "json/decoder.py"."""
        entries = (Entry(relative, reader(path, self.max_document_bytes)) for relative, path in _standard_library())
        yield from select(name, entries, self, skipped)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstalledPackages(Source):
    """Python files of the installed distributions, as their own file lists name them."""

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one document a module, named by distribution and path, as in "numpy:numpy/linalg/_linalg.py"."""
        yield from select(name, self._entries(), self, skipped)

    def _entries(self) -> Iterator[Entry]:
        for distribution_name, distribution in _distributions():
            for file in distribution.files or ():
                if _wanted(file):
                    path = Path(str(distribution.locate_file(file)))
                    yield Entry(f"{distribution_name}:{file.as_posix()}", reader(path, self.max_document_bytes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge(Source):
    """Prose: long descriptions of installed packages, and docstrings of the standard library, joined by module."""

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one document a package or module."""
        yield from select(name, self._entries(), self, skipped)

    def _entries(self) -> Iterator[Entry]:
        for distribution_name, distribution in _distributions():
            yield Entry(f"package:{distribution_name}", partial(_description, distribution), _long_enough)
        for relative, path in _standard_library():
            module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            yield Entry(f"docstrings:{module}", reader(path), partial(docstrings, module))


def _description(distribution: metadata.Distribution) -> bytes:
    # surrogateescape: a description that is not UTF-8 gives its own bytes back, and select() counts it as such
    headers = distribution.metadata
    text = headers["Description"] or str(headers.get_payload() or "")  # type: ignore[attr-defined]
    return text.strip().replace("\r\n", "\n").encode("utf-8", "surrogateescape")


def _long_enough(text: str) -> str | None:
    return text + "\n" if len(text) >= _SHORTEST_KNOWLEDGE else None


def docstrings(module: str, code: str) -> str | None:
    """Returns the docstrings of a module, its classes and functions, under their names; None when too little."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return None
    sections: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> None:
        text = ast.get_docstring(node)
        if text and len(text) >= _SHORTEST_DOCSTRING:
            sections.append(f"{name}\n\n{text.strip()}\n")
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}")

    visit(tree, module)
    return _long_enough("\n".join(sections).strip())
