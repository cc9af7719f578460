"""Reads what the stages of a work folder left, as plain data: no stage has to be there."""

import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """What one finished stage left.

    Attributes:
      name: of the stage; "distill/baseline" for the student without the teacher.
      summary: its summary.json.
      record: its stage.json: config, inputs, identity.
      metrics: its metrics.jsonl.
      meta: description of its newest checkpoint: model, lineage, progress; empty where it has none.
      total: parameters of the model that it left; 0 where it left none.
      active: those of them that a token uses.
    """

    name: str
    summary: dict[str, Any]
    record: dict[str, Any]
    metrics: list[dict[str, Any]]
    meta: dict[str, Any]
    total: int = 0
    active: int = 0

    @property
    def section(self) -> dict[str, Any]:
        """The stage's own config."""
        return self.record.get("config", {}).get(self.name, {})


@dataclasses.dataclass(frozen=True)
class Material:
    """Everything that the page shows.

    Attributes:
      title: of the page.
      command: that made the recipe.
      stages: the finished ones, in the recipe's order.
      baseline: the run without the teacher.
      manifest: of the corpus.
      scores: the arrays of prune/scores.npz.
      curve: the rows of prune/curve.jsonl.
      leave_one_out: prune/leave_one_out.json.
      comparison: export_hf/comparison.json.
      verify: upcycle/verify.json.
      outcomes: by benchmark, one {"task_id", "completion"} a sample, with "prompt", "status", "detail" where known.
      infillings: one {"prefix", "middle", "suffix", "completion"} a task.
    """

    title: str
    command: str
    stages: Sequence[Part]
    baseline: Part | None = None
    manifest: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    curve: Sequence[dict[str, Any]] = ()
    leave_one_out: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    comparison: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    verify: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outcomes: Mapping[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    infillings: Sequence[dict[str, Any]] = ()

    def part(self, name: str) -> Part | None:
        """The stage of that name, if it is finished."""
        return next((part for part in self.stages if part.name == name), None)

    def step(self, stage: str) -> dict[str, Any]:
        """The newest record that a transform left in the lineage of the checkpoints; empty where there is none."""
        for part in reversed(self.stages):
            for entry in reversed(part.meta.get("lineage", [])):
                if entry["stage"] == stage and "record" in entry:
                    return entry["record"]
        return {}


def read(
    workdir: Any,
    names: Sequence[str],
    models: Mapping[str, tuple[dict[str, Any], int, int]],
    *,
    title: str,
    command: str,
) -> Material:
    """Reads the finished stages among `names`.

    Args:
      workdir: the work folder.
      names: stages in the recipe's order.
      models: by stage (and "distill/baseline"), the description of its checkpoint, parameters, active parameters.
      title: of the page.
      command: that made the recipe.
    """
    root = files.path(workdir)
    parts = [_part(root, name, models) for name in names if (root / name / "summary.json").exists()]
    present = {part.name for part in parts}
    baseline = None
    if "distill" in present and (root / "distill/baseline/metrics.jsonl").exists():
        baseline = _part(root, "distill/baseline", models)
    return Material(
        title=title,
        command=command,
        stages=parts,
        baseline=baseline,
        manifest=_json(root / "prepare_data/corpus/manifest.json") if "prepare_data" in present else {},
        scores=_arrays(root / "prune/scores.npz") if "prune" in present else {},
        curve=_lines(root / "prune/curve.jsonl") if "prune" in present else (),
        leave_one_out=_json(root / "prune/leave_one_out.json") if "prune" in present else {},
        comparison=_json(root / "export_hf/comparison.json") if "export_hf" in present else {},
        verify=_json(root / "upcycle/verify.json") if "upcycle" in present else {},
        outcomes=_outcomes(root / "evaluate") if "evaluate" in present else {},
        infillings=_lines(root / "evaluate/infilling.jsonl") if "evaluate" in present else (),
    )


def _part(root: Any, name: str, models: Mapping[str, tuple[dict[str, Any], int, int]]) -> Part:
    meta, total, active = models.get(name, ({}, 0, 0))
    folder = root / name
    return Part(
        name, _numbers(_json(folder / "summary.json")), _json(folder / "stage.json"),
        _numbers(_lines(folder / "metrics.jsonl")), meta, total, active,
    )  # fmt: skip


def _numbers(value: Any) -> Any:
    """Nulls, which stand for what is not finite, as NaN."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return math.nan if value is None else value


def _json(place: Any) -> dict[str, Any]:
    return files.read_json(place) if place.exists() else {}


def _lines(place: Any) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a last line that was cut short is left out."""
    if not place.exists():
        return []
    try:
        return [json.loads(line) for line in place.read_text().split("\n")[:-1] if line]
    except ValueError as error:
        raise UserError(f"holds a line that is not JSON ({error})", where=str(place), remedy="restore it") from error


def _arrays(place: Any) -> dict[str, np.ndarray]:
    if not place.exists():
        return {}
    try:
        with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files if name != "meta"}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"is not a file of arrays ({error})", where=str(place), remedy="restore it") from error


def _outcomes(folder: Any) -> dict[str, list[dict[str, Any]]]:
    """By benchmark: the samples with their outcomes, or, where none were written, the samples alone."""
    found = {}
    for prefix in ("samples_", "outcomes_"):
        for place in sorted(folder.glob(f"{prefix}*.jsonl")):
            found[place.name.removeprefix(prefix).removesuffix(".jsonl")] = _lines(place)
    return found
