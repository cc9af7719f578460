"""Cycles and HBM bytes of a few of our TPU kernels, which a test holds within 1 % for the pinned libtpu.

    python -m benchmarks.kernel_gate        # writes benchmarks/kernel_gate.json anew: after a change that is meant

Static figures of the compiled schedules, for multinomial group sizes; of a small shape, so that they compile in seconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import kernel_shapes
from benchmarks.kernel_candidates import Candidate
from benchmarks.kernel_shapes import PRODUCTS, Case, Shape
from kernels.grouped_matmul import Backend
from kwaicoder_jax.hardware import schedule

FILE = Path(__file__).with_name("kernel_gate.json")
TOLERANCE = 0.01
CASES = {
    f"{chip} {product}": (chip, Case(Shape(16, 1024, 768), 8192, product))
    for chip in ("v5e", "v5p")
    for product in PRODUCTS
}


def costs(name: str) -> dict[str, int]:
    """Of a case: cycles of the slower core and bytes that all of them move."""
    chip, case = CASES[name]
    candidate = Candidate(Backend.TPU, case)
    sizes = kernel_shapes.sizes("multinomial", case.shape.groups, case.rows)
    found = candidate.compile(chip).predict(candidate.scalars(sizes))
    return {"cycles": found.cycles, "hbm_bytes": found.hbm_bytes}


def main() -> None:
    """Writes the file."""
    found = {name: costs(name) for name in CASES}
    lines = ",\n".join(f'  "{name}": {json.dumps(each)}' for name, each in found.items())
    FILE.write_text(f'{{\n  "libtpu": "{schedule.LIBTPU_VERSION}",\n{lines}\n}}\n')
    print(FILE.read_text())


if __name__ == "__main__":
    main()
