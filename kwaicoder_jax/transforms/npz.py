"""Named arrays and a JSON value in one .npz file, written whole or not at all."""

import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from kwaicoder_jax import files


def write(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], meta: Any) -> None:
    """Writes `arrays` and `meta` (JSON-able), through a temporary file and a rename; makes the folder."""
    buffer = io.BytesIO()
    named: dict[str, Any] = {**arrays, "meta": np.array(json.dumps(meta, sort_keys=True))}
    np.savez(buffer, **named)
    target = files.path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(target)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Any]:
    """What `write` wrote; OSError, ValueError or KeyError where it did not write that file."""
    with np.load(io.BytesIO(files.path(path).read_bytes())) as stored:
        arrays = {name: stored[name] for name in stored.files if name != "meta"}
        return arrays, json.loads(str(stored["meta"]))
