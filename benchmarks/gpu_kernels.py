"""The grouped products on an H100, from what its compiler makes of them; no GPU is needed, and none is asked.

    python -m benchmarks.gpu_kernels [--json=FILE] [--shapes=64x2048x1408,...] [--rows=32768,131072] [--disassembler=DIR]

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version. Registers, spills and shared memory are what ptxas says. Two
columns are read from machine code, for which DIR/bin has nvdisasm (pip install --target=FOLDER nvidia-cuda-nvdisasm; DIR is
FOLDER/nvidia/cu13): the share of tensor-core instructions in the loop over the contracted axis, branches that are seldom
taken included, and the FLOPs, in thousands, of a warpgroup there for each of its instructions. Executed FLOPs and bytes are
counted from multinomial sizes of groups (seed 0) by `benchmarks.gpu_tiles_walked`. "upstream" is jax's ragged_dot_mgpu and
transposed_ragged_dot_mgpu in tiles of 128 x 128 and 4 steps; "ragged_dot" what XLA makes of jax.lax.ragged_dot.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

from benchmarks import gpu_tiles_walked as walked
from kernels.grouped_matmul import gpu, gpu_tiles, ragged_dot
from kwaicoder_jax.hardware import Topology, gpu_code, hlo, topology, work

SHAPES = ("8x4096x14336", "64x2048x1408", "64x3072x2560", "128x2048x768", "256x7168x2048")
ROWS = (32_768, 131_072)
PRODUCTS = ("forward", "dlhs", "drhs")
_TILE = 128  # of upstream's kernels
_COLUMNS = (
    "flops_ratio", "copied_gb", "hbm_gb", "temporary_gb", "registers", "spilled_bytes", "shared_kb", "tensor_share",
    "loop_kflops",
)  # fmt: skip


def multinomial(rows: int, groups: int) -> np.ndarray:
    """Sizes of groups of which each row draws one."""
    return np.random.default_rng(0).multinomial(rows, [1 / groups] * groups)


@contextlib.contextmanager
def dump(disassembler: str | None) -> Iterator[str]:
    """A folder that Mosaic GPU's compiler writes to while this lasts."""
    # jax sets the path of the disassembler when it is imported.
    settings = {"MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_CUDA_ROOT": disassembler} if disassembler else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": folder, **settings}),
    ):
        yield folder


def functions(machine: Topology) -> dict[str, dict[str, Callable[..., jax.Array]]]:
    """By implementation and product, functions of two arrays and the sizes of groups."""
    tiles: dict[str, Any] = {"block_m": _TILE, "block_n": _TILE, "block_k": gpu_tiles.DEPTH, "max_concurrent_steps": 4}

    def upstream(lhs_MK: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array, transpose_rhs: bool = False) -> jax.Array:
        width = rhs_GKN.shape[1 if transpose_rhs else 2]
        how = {**tiles, "grid_block_n": gpu_tiles.strip_of(width // _TILE), "transpose_rhs": transpose_rhs}
        return ragged_dot_mgpu.ragged_dot(lhs_MK, rhs_GKN, group_sizes=sizes_G, **how)

    def upstream_outer(lhs_MK: jax.Array, dout_MN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        how = {**tiles, "grid_block_n": gpu_tiles.strip_of(dout_MN.shape[1] // _TILE)}
        with mock.patch.object(jax, "devices", return_value=machine.devices):  # it asks how many SMs the first one has
            return transposed_ragged_dot_mgpu.transposed_ragged_dot(lhs_MK, dout_MN, group_sizes=sizes_G, **how)

    def dense_dlhs(dout_MN: jax.Array, rhs_GKN: jax.Array, sizes_G: jax.Array) -> jax.Array:
        return ragged_dot.product(dout_MN, rhs_GKN.swapaxes(1, 2), sizes_G)

    our_dlhs, upstream_dlhs = (functools.partial(made, transpose_rhs=True) for made in (gpu.product, upstream))
    return {
        "ours": dict(zip(PRODUCTS, (gpu.product, our_dlhs, gpu.outer))),
        "upstream": dict(zip(PRODUCTS, (upstream, upstream_dlhs, upstream_outer))),
        "ragged_dot": dict(zip(PRODUCTS, (ragged_dot.product, dense_dlhs, ragged_dot.outer))),
    }


def executed(implementation: str, product: str, sizes: np.ndarray, depth: int, width: int) -> walked.Work:
    """What a kernel does for these sizes, of matrices of [depth, width]."""
    if product == "drhs":
        return walked.outer(sizes, depth, width, None if implementation == "ours" else _TILE)
    made = walked.product if implementation == "ours" else walked.upstream_product
    return made(sizes, depth, width) if product == "forward" else made(sizes, width, depth)


def measure(
    machine: Topology, implementation: str, product: str, shape: str, rows: int, disassembler: str | None = None
) -> dict[str, Any]:
    """One row of the table."""
    groups, depth, width = map(int, shape.split("x"))
    sharding = jax.sharding.SingleDeviceSharding(machine.devices[0])
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=sharding)
    lhs, rhs, dout = array((rows, depth)), array((groups, depth, width)), array((rows, width))
    operands = {"forward": (lhs, rhs), "dlhs": (dout, rhs), "drhs": (lhs, dout)}[product]
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32, sharding=sharding)
    function = functions(machine)[implementation][product]
    with dump(disassembler) as folder:
        compiled: Any = jax.jit(lambda *arguments: function(*arguments)).lower(*operands, sizes).compile()
        code = None if implementation == "ragged_dot" else gpu_code.read(folder)[-1]
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e9
    row = {"implementation": implementation, "chip": "h100", "shape": shape, "groups": groups, "rows": rows}
    row |= {"product": product, "sizes": "multinomial", "temporary_gb": round(temporary, 3)}
    if code is None:
        found = work.measure(hlo.parse(compiled.as_text()))
        done = walked.Work(found.flops, float("nan"), found.hbm_bytes)
    else:
        done = executed(implementation, product, multinomial(rows, groups), depth, width)
        row |= {"registers": code.registers, "spilled_bytes": code.spilled_bytes, "threads": code.threads}
        row |= {"shared_kb": round(code.shared_bytes / 1024, 1), "waits": code.waits}
        if code.loop:
            row["tensor_share"] = round(code.loop.tensor / code.loop.instructions, 3)
            row["loop_kflops"] = round(code.loop.flops / code.loop.instructions / 1000, 1)
    least = 2 * (rows * (depth + width) + groups * depth * width)
    row |= {"flops_ratio": round(done.flops / (2 * rows * depth * width), 3), "least_gb": round(least / 1e9, 3)}
    return row | {"copied_gb": round(done.copied_bytes / 1e9, 2), "hbm_gb": round(done.hbm_bytes / 1e9, 3)}


def main() -> None:
    """Parses flags, prints the table, writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write the rows to, as a JSON list")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help="groups x contracted width x output width of forward"
    )
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="in all groups")
    parser.add_argument("--disassembler", help="folder whose bin/ has nvdisasm")
    flags = parser.parse_args()
    machine = topology("h100:1")
    rows = []
    print(f"{'shape':14s} {'rows':>6s} {'product':8s}{'':11s}" + "".join(f" {name:>13s}" for name in _COLUMNS))
    for shape in flags.shapes.split(","):
        for count in map(int, flags.rows.split(",")):
            for product in PRODUCTS:
                for name in ("ours", "upstream", "ragged_dot"):
                    rows.append(row := measure(machine, name, product, shape, count, flags.disassembler))
                    cells = "".join(f" {row.get(column, ''):>13}" for column in _COLUMNS)
                    print(f"{shape:14s} {count:6d} {product:8s} {name:10s}{cells}", flush=True)
    if flags.json:
        with open(flags.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
