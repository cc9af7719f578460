"""Sizes of tiles of the kernels of `tpu_rows`, chosen by plan, shape and chip."""

from __future__ import annotations

import jax.numpy as jnp

from kernels.grouped_matmul import tpu_gather
from kernels.grouped_matmul.tpu_plan import Call, Plan
from kernels.grouped_matmul.tpu_tiles import BODY, LANES, Chip, ProductTiles, divisors, fits, windows

ZERO_ROWS = 128  # that one copy of zeros writes


def rows_tiles(plan: Plan, call: Call, here: Chip) -> ProductTiles:
    """The tiles that move fewest bytes of those that fit.

    Args:
      plan: what is computed.
      call: shapes.
      here: the chip.

    Raises:
      ValueError: not even the smallest fit.
    """
    products = sum(len(part) for part in plan.parts)
    found = []
    for columns in divisors(call.width):
        blocks = [block for block in divisors(columns) if products * call.depth * block <= BODY] or [LANES]
        for most in windows(here):
            if call.gathered and most > (tpu_gather.HELD - 1) * call.piece:
                continue  # a window that begins anywhere touches one piece more
            tiles = ProductTiles(most, columns, here.mxu, here.mxu // 4, blocks[0])
            if fits(vmem_bytes(plan, call, tiles), here):
                moved = call.rows * call.depth * max(call.lhs, 1) * tiles.passes(call.width)
                found.append((moved, -most, tiles))
    if not found:
        raise ValueError(
            f"no tiles of {plan.name}, {call.depth} x {call.width}, fit in {here.vmem_bytes} bytes of VMEM"
        )
    return min(found, key=lambda each: each[:2])[-1]


def vmem_bytes(plan: Plan, call: Call, tiles: ProductTiles) -> int:
    """Of the buffers, and of the float32 results of one block."""
    size, window = call.dtype.itemsize, tiles.lhs_slots * tiles.rows
    if call.gathered:
        rows = ((tpu_gather.ARRIVING + tpu_gather.HELD) * call.piece + tiles.block_rows) * call.depth * size
    else:
        rows = call.lhs * window * call.depth * size
    beside = window * (call.beside * tiles.columns * size + call.of_rows * LANES * 4)
    matrix = call.depth * jnp.dtype(call.rhs_dtype).itemsize + 8 * 4 * call.scaled  # a scale takes a whole tile
    held = len(plan.held) * 2 * tiles.columns * matrix
    per_column = tiles.out_slots * tiles.rows + call.align
    outs = sum(
        jnp.dtype(out.dtype).itemsize * out.columns(tiles) * (per_column + ZERO_ROWS * tiles.passes(call.width))
        for out in plan.outs
    )
    return rows + beside + held + outs + 4 * tiles.block_rows * tiles.columns * len(plan.parts)
