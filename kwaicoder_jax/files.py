"""Files that are either whole or absent, on a local disk or on an object store (paths go through etils.epath)."""

import hashlib
import json
import math
import os
from typing import Any

from etils import epath

from kwaicoder_jax.errors import UserError


def path(place: str | os.PathLike[str]) -> epath.Path:
    """Returns `place` as a path object that also understands gs:// and s3://."""
    return epath.Path(place)


def absolute(place: str | os.PathLike[str]) -> epath.Path:
    """`place` from the root; a place on an object store is that already, and etils would put the current folder before."""
    found = epath.Path(place)
    return found if "://" in os.fspath(found) else found.absolute()


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, never a part: a temporary file, then a rename."""
    write_bytes(target, text.encode())


def write_bytes(target: str | os.PathLike[str], content: bytes) -> None:
    """As `write_text`."""
    whole = epath.Path(target)
    whole.parent.mkdir(parents=True, exist_ok=True)
    temporary = whole.parent / f".{whole.name}.{os.getpid()}.tmp"
    temporary.write_bytes(content)
    temporary.replace(whole)


def append_text(target: str | os.PathLike[str], text: str) -> None:
    """Adds `text` at the end of a file; on an object store, which knows no adding, writes it anew."""
    whole = epath.Path(target)
    if "://" in os.fspath(target):
        write_text(whole, (whole.read_text() if whole.exists() else "") + text)
        return
    with whole.open("a") as out:
        out.write(text)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically; NaN and the infinities become null."""
    write_text(target, json.dumps(finite(value), indent=2, sort_keys=True, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """`value` with null for every float that JSON has no number for (a run that diverged)."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(source: str | os.PathLike[str]) -> Any:
    """Reads one JSON file; one that is cut off or is something else is a UserError that names it."""
    try:
        return json.loads(epath.Path(source).read_text())
    except ValueError as error:
        raise UserError(
            f"is not JSON ({error})", where=os.fspath(source), remedy="restore it, or start its stage over (--restart)"
        ) from error


def digest(value: Any) -> str:
    """Hex SHA-256 (first 16 digits) of a JSON value; equal values give equal digests in any key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
