"""Files below a folder, and files of a git repository, as containers."""

import os
import stat
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, cast

from kwaicoder_jax.data.reading.archives import Container, Listing, Skipped, clean_name
from kwaicoder_jax.data.reading.streams import Limits, Refused
from kwaicoder_jax.errors import UserError

_PASSED_OVER = frozenset({".git", ".hg", ".svn", ".bzr", "CVS", "__pycache__"})  # folders


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path below root, lstat) of all that is no folder, links included and not followed."""
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    path = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name not in _PASSED_OVER:
                            folders.append(path)
                    else:
                        yield path, entry.stat(follow_symlinks=False)
        except OSError:
            continue  # a folder that may not be listed, or went away


def read_file(path: Path, most: int) -> bytes | str:
    """The bytes of a plain file, or why there are none: "link", "special_file", "too_large", "unreadable"."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return "link" if path.is_symlink() else "unreadable"
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return "special_file"
        if status.st_size > most:
            return "too_large"
        try:
            raw = file.read(most + 1)
        except OSError:
            return "unreadable"
        return raw if len(raw) <= most else "too_large"


class FolderFiles(Container):
    """Some files below a folder.

    Args:
      root: the folder.
      paths: below it, as the file system gives them.
      limits: `member_bytes` bounds a file.
    """

    def __init__(self, root: Path, paths: Collection[str], limits: Limits):
        self._root, self._limits = root, limits
        self._paths: dict[str, str] = {}
        self._refused: list[Skipped] = []
        for path in sorted(paths):
            name, reason = clean_name(path)
            if reason := reason or ("duplicate_name" if name in self._paths else ""):
                self._refused.append(Skipped(name, reason))
            else:
                self._paths[name] = path

    def listing(self) -> Listing:
        sizes: dict[str, int] = {}
        refused = list(self._refused)
        for name, path in sorted(self._paths.items()):
            try:
                sizes[name] = os.lstat(self._root / path).st_size
            except OSError:
                refused.append(Skipped(name, "unreadable"))
        return Listing(sizes, sorted(refused))

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes | Skipped]]:
        for name in sorted(names):
            raw = read_file(self._root / self._paths[name], self._limits.member_bytes)
            yield name, Skipped(name, raw) if isinstance(raw, str) else raw


# What a stranger's repository may not do to whoever reads it: run hooks or helpers, fetch, swap objects, read other configs.
_ENVIRONMENT = {
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_ALLOW_PROTOCOL": "none",
    "GIT_NO_LAZY_FETCH": "1",
    "GIT_NO_REPLACE_OBJECTS": "1",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
    "PATH": os.defpath,
}
_SAFE = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")


def _git(repository: Path, *arguments: str) -> list[str]:
    place = repository / ".git"
    return ["git", *_SAFE, f"--git-dir={place if place.exists() else repository}", *arguments]


class GitFiles(Container):
    """Files of a repository's HEAD, from its objects: a checkout's changes and a hostile worktree do not matter.

    Args:
      repository: a folder with ".git", or a bare repository.
      paths: to read; None: all.
      limits: `member_bytes` bounds a file.
    """

    def __init__(self, repository: Path, paths: Collection[str] | None, limits: Limits):
        self._repository, self._limits = repository, limits
        self._paths = None if paths is None else frozenset(paths)
        self._objects: dict[str, str] = {}

    def tree(self) -> Mapping[str, tuple[str, str, int]]:
        """Mode, object and bytes by path, with surrogate escapes; raises Refused where git cannot read the repository."""
        command = _git(self._repository, "ls-tree", "-r", "-z", "-l", "--full-tree", "HEAD")
        try:
            done = subprocess.run(command, capture_output=True, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, timeout=600)
        except FileNotFoundError as error:
            raise UserError("git is not installed", where=str(self._repository), remedy="install git") from error
        except subprocess.TimeoutExpired as error:
            raise Refused("broken_repository") from error
        if done.returncode:
            raise Refused("broken_repository")
        found: dict[str, tuple[str, str, int]] = {}
        for line in done.stdout.split(b"\0"):
            facts, tab, path = line.partition(b"\t")
            if tab:
                mode, _, name, size = facts.decode().split()
                found[path.decode("utf-8", "surrogateescape")] = (mode, name, int(size) if size.isdigit() else 0)
        return found

    def listing(self) -> Listing:
        sizes: dict[str, int] = {}
        refused: list[Skipped] = []
        for path, (mode, name, size) in self.tree().items():
            if self._paths is not None and path not in self._paths:
                continue
            clean, reason = clean_name(path)
            reason = reason or {"120000": "link", "160000": "submodule"}.get(mode, "")
            if not reason and clean in sizes:
                reason = "duplicate_name"
            if not reason and size > self._limits.member_bytes:
                reason = "too_large"
            if reason:
                refused.append(Skipped(clean, reason))
            else:
                sizes[clean] = size
                self._objects[clean] = name
        return Listing(dict(sorted(sizes.items())), sorted(refused))

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes | Skipped]]:
        if not names:
            return
        command = _git(self._repository, "cat-file", "--batch")
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=_ENVIRONMENT, bufsize=1 << 16
        ) as process:
            source, out = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
            try:
                for name in sorted(names):
                    raw = _object(source, out, self._objects[name])
                    yield name, Skipped(name, "unreadable") if raw is None else raw
            finally:
                process.kill()


def _object(source: IO[bytes], out: IO[bytes], name: str) -> bytes | None:
    """One object through a running `git cat-file --batch`; None where it is missing or git has died."""
    try:
        source.write(name.encode() + b"\n")
        source.flush()
    except OSError:
        return None
    facts = out.readline().split()
    if len(facts) != 3 or facts[1] != b"blob":
        return None
    raw = out.read(int(facts[2]) + 1)
    return raw[:-1] if len(raw) == int(facts[2]) + 1 else None
