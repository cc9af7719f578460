"""Files that are either whole or absent, on a local disk or on an object store (paths go through etils.epath)."""

import hashlib
import json
import os
from typing import Any

from etils import epath


def path(place: str | os.PathLike[str]) -> epath.Path:
    """Returns `place` as a path object that also understands gs:// and s3://."""
    return epath.Path(place)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Writes `text` so that a reader sees the old file or the new one, never a part: a temporary file, then a rename."""
    whole = epath.Path(target)
    whole.parent.mkdir(parents=True, exist_ok=True)
    temporary = whole.parent / f".{whole.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(whole)


def write_json(target: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON with sorted keys, atomically."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(source: str | os.PathLike[str]) -> Any:
    """Reads one JSON file."""
    return json.loads(epath.Path(source).read_text())


def digest(value: Any) -> str:
    """Hex SHA-256 (first 16 digits) of a JSON value; equal values give equal digests in any key order."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
