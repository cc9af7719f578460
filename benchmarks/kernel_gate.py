"""Cycles and HBM bytes of a few of our TPU kernels, which a test holds within 1 % for the pinned libtpu.

    python -m benchmarks.kernel_gate        # writes benchmarks/kernel_gate.json anew: after a change that is meant

Static figures of the compiled schedules, for multinomial group sizes; of a small shape, so that they compile in seconds.
"layer" is the fused kernels of forward and backward.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

from benchmarks import fused_layer, kernel_shapes
from benchmarks.kernel_candidates import Candidate
from benchmarks.kernel_shapes import PRODUCTS, Case, Shape
from kernels.grouped_matmul import Backend, tpu_tiles
from kwaicoder_jax.hardware import schedule

FILE = Path(__file__).with_name("kernel_gate.json")
TOLERANCE = 0.01
_SHAPE, _ROWS = Shape(16, 1024, 768), 8192
CASES = {f"{chip} {what}": (chip, what) for chip in ("v5e", "v5p") for what in (*PRODUCTS, "layer")}


def costs(name: str) -> dict[str, int]:
    """Of a case: cycles of the slower core and bytes that all of them move, of each kernel that takes group sizes."""
    chip, what = CASES[name]
    sizes = kernel_shapes.sizes("multinomial", _SHAPE.groups, _ROWS)
    if what != "layer":
        kernels = {"": Candidate(Backend.TPU, Case(_SHAPE, _ROWS, what)).compile(chip)}
    else:
        given = fused_layer.arguments_of(_ROWS // fused_layer.CHOICES, _SHAPE.groups, _SHAPE.depth, _SHAPE.width)
        made = functools.partial(fused_layer.fused_step, chip=tpu_tiles.chip_called(chip))
        compiled = schedule.compile_kernels(made, (*given, given[0].x_MD), chip=chip, kernel="experts_")
        kernels = {f"{re.sub(r'[.][0-9]+$', '', each.name)} ": each for each in compiled}
    found = {key: kernel.predict({0: sizes}) for key, kernel in sorted(kernels.items())}
    return {f"{key}{field}": getattr(each, field) for key, each in found.items() for field in ("cycles", "hbm_bytes")}


def main() -> None:
    """Writes the file."""
    found = {name: costs(name) for name in CASES}
    lines = ",\n".join(f'  "{name}": {json.dumps(each)}' for name, each in found.items())
    FILE.write_text(f'{{\n  "libtpu": "{schedule.LIBTPU_VERSION}",\n{lines}\n}}\n')
    print(FILE.read_text())


if __name__ == "__main__":
    main()
