"""The grouped matmul: our TPU kernels beside megablox, tokamax and ragged_dot, on the same products and group sizes.

    python -m benchmarks.kernels [--chip=v5e] [--shapes=64x2048x1408,...] [--rows=32768,...] [--products=forward,...]
        [--sizes=multinomial,...] [--json=FILE]

Times are predicted from the compiled schedules (docs/schedule.md), of the kernels alone; no TPU is needed, and nothing is
measured unless the column "timed" is filled, which it is where the chip is in this machine. bfloat16, float32 sums. Ours
choose their own tiles; megablox and tokamax take the best of a small search, for each kind of group sizes anew. ratio: their
time over ours, above 1 if ours is faster. What ragged_dot takes is a bound from below: it is a program, not a kernel.

Rows that the JSON file already holds for the chip are not made again: a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import kernel_bounds, kernel_candidates, kernel_shapes, kernel_timing
from benchmarks.kernel_candidates import UPSTREAM, Candidate
from benchmarks.kernel_shapes import SHAPES, Case
from kernels.grouped_matmul import Backend
from kwaicoder_jax import hardware
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import schedule

Predictions = Mapping[str, schedule.Prediction]  # by kind of sizes
Row = dict[str, Any]


def predict(candidate: Candidate, chip: str, sizes: Mapping[str, np.ndarray]) -> Predictions:
    """Compiles once, and predicts for all group sizes."""
    kernel = candidate.compile(chip)
    flops = candidate.case.useful_flops
    return {kind: kernel.predict(candidate.scalars(each), useful_flops=flops) for kind, each in sizes.items()}


Found = list[tuple[Candidate, Predictions]]


def attempt(candidate: Candidate, chip: str, sizes: Mapping[str, np.ndarray]) -> Found:
    """A list of one, or of none where the compiler refuses it: tiles that do not fit."""
    try:
        return [(candidate, predict(candidate, chip, sizes))]
    except (UserError, ValueError):
        return []


def search(case: Case, chip: str, sizes: Mapping[str, np.ndarray]) -> dict[Backend, Found]:
    """Upstream's kernels with a few tiles each.

    Of megablox the smallest row tile with all tiles of depth and width, and the other row tiles with those that did best for
    the first kind of sizes. tokamax's kernel is a copy of it but for its own pipeline, which works on one core: where the
    chip has one it gets what was best for megablox with any sizes, else all row tiles, with few and wide columns.
    """
    first, *others = kernel_candidates.row_tiles(case)
    cores = schedule.tensor_cores(chip).count
    candidate = functools.partial(_candidate, case, cores)
    places = range(len(kernel_candidates.inner_tiles(case, first, cores)))
    by_place = {place: attempt(candidate(Backend.MEGABLOX, first, place), chip, sizes) for place in places}
    kind = next(iter(sizes))
    done = [(each[0][1][kind].seconds, place) for place, each in by_place.items() if each]
    place = min(done, default=(0.0, 0))[1]
    found = [one for each in by_place.values() for one in each]
    for tile in others:
        found += attempt(candidate(Backend.MEGABLOX, tile, place), chip, sizes)
    theirs = {fastest(found, kind)[0].tiles for kind in sizes if found}
    if cores > 1:
        theirs = {candidate(Backend.TOKAMAX, tile, 0).tiles for tile in (first, *others)}
    tried = [
        one
        for tiles in sorted(theirs, key=str)
        for one in attempt(Candidate(Backend.TOKAMAX, case, tiles), chip, sizes)
    ]
    return {Backend.MEGABLOX: found, Backend.TOKAMAX: tried}


def _candidate(case: Case, cores: int, backend: Backend, tile: int, place: int) -> Candidate:
    inner = kernel_candidates.inner_tiles(case, tile, cores)
    return Candidate(backend, case, (tile, *inner[min(place, len(inner) - 1)]))


def fastest(found: Found, kind: str) -> tuple[Candidate, schedule.Prediction]:
    """For one kind of sizes."""
    return min(((candidate, each[kind]) for candidate, each in found), key=lambda pair: pair[1].seconds)


def compare(case: Case, chip: str, sizes: Mapping[str, np.ndarray]) -> list[Row]:
    """One row for each kind of sizes: predicted for a TPU, timed where the chip is here."""
    rows: list[Row] = [
        {"chip": chip, "shape": case.shape.matrix, "groups": case.shape.groups, "rows": case.rows,
         "product": case.product, "sizes": kind}
        for kind in sizes
    ]  # fmt: skip
    upstream: dict[Backend, Found] = {}
    if hardware.chip(chip).torus_axes:
        upstream = search(case, chip, sizes)
        predictions, bound = predict(Candidate(Backend.TPU, case), chip, sizes), kernel_bounds.ragged_dot(case, chip)
        for row, (kind, found) in zip(rows, predictions.items(), strict=True):
            row |= _figures(found)
            for backend, tried in upstream.items():
                row |= _beside(backend, fastest(tried, kind) if tried else None, found)
            row |= {
                "ragged_dot_flops_ratio": bound.flops / case.useful_flops, "ragged_dot_hbm_bytes": bound.hbm_bytes,
                "ragged_dot_seconds_at_least": bound.seconds(sizes[kind]),
            }  # fmt: skip
    if _chip_here() == chip:
        for row in rows:
            chosen = {backend: fastest(tried, row["sizes"])[0] for backend, tried in upstream.items() if tried}
            row |= measured(case, chosen, sizes[row["sizes"]])
    return rows


def _figures(found: schedule.Prediction) -> Row:
    return {
        "predicted_seconds": found.seconds, "predicted_seconds_low": found.seconds_low,
        "predicted_seconds_high": found.seconds_high, "predicted_util": found.utilization,
        "ideal_seconds": found.ideal_seconds, "steps": found.steps, "cycles": found.cycles,
        "mxu_share": found.mxu_share, "stall_cycles": found.stall_cycles, "hbm_bytes": found.hbm_bytes,
        "vmem_bytes": found.vmem_bytes, "cores_used": found.cores_used,
    }  # fmt: skip


def _beside(backend: Backend, best: tuple[Candidate, schedule.Prediction] | None, ours: schedule.Prediction) -> Row:
    if best is None:
        return {f"ratio_to_{backend}": None}
    candidate, found = best
    return {
        f"ratio_to_{backend}": found.seconds / ours.seconds,
        f"{backend}_seconds": found.seconds,
        f"{backend}_util": found.utilization,
        f"{backend}_tiles": candidate.tiles,
    }


def measured(case: Case, chosen: Mapping[Backend, Candidate], sizes: np.ndarray) -> Row:
    """Wall time of what runs on this machine, upstream's with these tiles; "measured_seconds" is that of ours."""
    found = {
        str(backend): _timed(chosen.get(backend, Candidate(backend, case)), sizes)
        for backend in kernel_timing.backends(jax.default_backend())
        if backend in chosen or backend not in UPSTREAM
    }
    ours = next(iter(found))
    return {"measured_seconds": found[ours], "measured_backend": ours, "measured_seconds_of": found}


def _timed(candidate: Candidate, sizes: np.ndarray) -> float:
    return kernel_timing.seconds(candidate.function, candidate.arguments, sizes)


def _chip_here() -> str | None:
    """Of this machine, if it is in the chip table."""
    found = None if jax.default_backend() == "cpu" else hardware.chip_of(jax.devices()[0].device_kind)
    return None if found is None else found.name


COLUMNS = (
    "shape", "groups", "rows", "product", "sizes", "predicted ms (range)", "% of peak", "steps", "kcycles", "MXU %",
    "stalls kcycles", "HBM GB", "VMEM MiB", "cores", "megablox %", "ratio", "tokamax %", "ratio",
    "ragged_dot ms, at least", "timed ms",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """Of a row, as `COLUMNS` names them; "-" for what there is not."""

    def text(key: str, form: str, unit: float = 1.0) -> str:
        value = row.get(key)
        return "-" if value is None else format(value / unit, form)

    low, middle, high = (text(f"predicted_seconds{end}", ".3f", 1e-3) for end in ("_low", "", "_high"))
    beside = [
        each for backend in UPSTREAM for each in (text(f"{backend}_util", ".1%"), text(f"ratio_to_{backend}", ".2f"))
    ]
    return [
        row["shape"], str(row["groups"]), str(row["rows"]), row["product"], row["sizes"], f"{middle} ({low} to {high})",
        text("predicted_util", ".1%"), text("steps", ".0f"), text("cycles", ".0f", 1e3), text("mxu_share", ".0%"),
        text("stall_cycles", ".0f", 1e3), text("hbm_bytes", ".2f", 1e9), text("vmem_bytes", ".0f", 2**20),
        text("cores_used", ".0f"), *beside, text("ragged_dot_seconds_at_least", ".3f", 1e-3),
        text("measured_seconds", ".3f", 1e-3),
    ]  # fmt: skip


def _same(row: Row, chip: str, case: Case) -> bool:
    wanted = (chip, case.shape.matrix, case.shape.groups, case.rows, case.product)
    return tuple(row[key] for key in ("chip", "shape", "groups", "rows", "product")) == wanted


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--chip", default=_chip_here() or "v5e", help="v5e, v5p or v6e; another one is timed alone, and has to be here"
    )
    choices = {
        "shapes": list(SHAPES),
        "rows": kernel_shapes.ROWS,
        "products": kernel_shapes.PRODUCTS,
        "sizes": kernel_shapes.SIZES,
    }
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", default=",".join(map(str, allowed)), help="separated by commas")
    parser.add_argument("--json", help="file for the rows, as a JSON list; what it holds is not made again")
    flags = parser.parse_args(arguments)
    shapes, all_rows, products, kinds = (
        kernel_shapes.chosen(getattr(flags, name), allowed, f"--{name}") for name, allowed in choices.items()
    )
    made: list[Row] = json.loads(Path(flags.json).read_text()) if flags.json and Path(flags.json).exists() else []
    if flags.chip != _chip_here():
        kernel_shapes.chosen(flags.chip, kernel_shapes.CHIPS, "--chip")
    print(f"{flags.chip}: predicted from the compiled schedule, not measured, but for the last column", flush=True)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for case in (Case(SHAPES[name], rows, product) for rows in all_rows for name in shapes for product in products):
        rows = [row for row in made if _same(row, flags.chip, case) and row["sizes"] in kinds]
        if missing := [kind for kind in kinds if kind not in [row["sizes"] for row in rows]]:
            sizes = {kind: kernel_shapes.sizes(kind, case.shape.groups, case.rows) for kind in missing}
            new = compare(case, flags.chip, sizes)
            rows, made = rows + new, made + new
            if flags.json:  # at once: it takes minutes
                Path(flags.json).write_text(json.dumps(made, indent=1))
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |", flush=True)


if __name__ == "__main__":
    main()
