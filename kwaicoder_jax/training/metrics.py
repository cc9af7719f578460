"""metrics.jsonl, one JSON object per logged step, with TensorBoard events beside it."""

import json
import os
import sys
from typing import Any

import numpy as np
from etils import epath

from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError

# What differs from run to run; everything else repeats to the bit.
TIME_KEYS = ("seconds", "tokens_per_second", "tokens_per_second_per_chip", "mfu")


class MetricsLog:
    """Appends records; opening it for a resumed run first drops what lies after the restored step.

    Args:
      folder: the stage folder.
      restored_step: the step that training goes on from; None for a fresh start.
      evaluated_step: that of the last evaluation that counts; a later one will be made again.
    """

    def __init__(self, folder: str | os.PathLike[str], restored_step: int | None, evaluated_step: int | None = None):
        self.file = epath.Path(folder) / "metrics.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._cut(restored_step, restored_step if evaluated_step is None else evaluated_step)
        purge = None if restored_step is None else restored_step + 1
        self._events = None
        if "://" in os.fspath(folder):
            return  # its writers for object stores need packages of their own; metrics.jsonl holds the same numbers
        self._events = _event_writer()(os.fspath(epath.Path(folder) / "events"), purge_step=purge, flush_secs=30)

    def _cut(self, restored_step: int | None, evaluated_step: int | None) -> None:
        kept = []
        if restored_step is not None and evaluated_step is not None:
            for record in read_metrics(self.file):
                if record["step"] <= (evaluated_step if "valid_loss" in record else restored_step):
                    kept.append(record)
        files.write_text(self.file, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record; it must hold "step". The line is in the file when this returns.

        JSON has no number for NaN and the infinities (a run that diverged): they are written as null, read as None.
        """
        record = files.finite({key: _plain(value) for key, value in record.items()})
        files.append_text(self.file, json.dumps(record, allow_nan=False) + "\n")
        for key, value in record.items():
            if isinstance(value, float) and self._events is not None:
                self._events.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Flushes the TensorBoard events."""
        if self._events is not None:
            self._events.close()


def _event_writer() -> Any:
    """tensorboardX's writer. It would import PyTorch where that is installed: a second or more, for nothing we use."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, as where it is not installed
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


def read_metrics(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All whole records of a metrics file; a last line that a crash cut short is left out."""
    place = epath.Path(file)
    if not place.exists():
        return []
    lines = place.read_text().split("\n")
    try:
        return [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        remedy = "restore it, or start the stage over (--restart)"
        raise UserError(f"holds a line that is not JSON ({error})", where=os.fspath(file), remedy=remedy) from error
