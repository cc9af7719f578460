"""Products of rows on TPU, one matrix a group, with what is done to the results before they are written.

One program a core. A core takes an equal share of the rows; it reads each group's matrices once, into one of two buffers,
while it multiplies the rows of the group before. Rows come in windows of whole sublane tiles (see `tpu_walk`), some visits
ahead, and only those that are there: what remains of a group is copied and multiplied in a short piece. Or they are
gathered (see `tpu_gather`). The results of a tile that two groups share are put together in VMEM.

                held: columns of the group's matrices
                |-- block --|-- block --|
    window      ############ ############       a block of rows and columns: part 0 = lhs 0 @ held 0 (+ lhs 1 @ held 1)
    of a        ############ ############                                    part 1 = ...
    group's     ############ ############       out 0, out 1, ... = finish(parts, what is beside them)
    rows        ### rest ### ### rest ###
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import tpu_gather, tpu_rows_kernel
from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices
from kernels.grouped_matmul.tpu_fused_tiles import ZERO_ROWS, rows_tiles
from kernels.grouped_matmul.tpu_plan import Call, Plan
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, ProductTiles, sublanes, vmem_limit

PIECE = 256  # rows that are gathered together


def grouped_rows(
    lhs: Sequence[jax.Array], matrices: Sequence[Matrices], group_sizes_G: jax.Array, plan: Plan, *, width: int,
    beside: Sequence[jax.Array] = (), of_rows: Sequence[jax.Array] = (), index_M: jax.Array | None = None,
    dtype: Any = None,
    here: Chip, tiles: ProductTiles | None = None, piece: int = PIECE, interpret: Any = False,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """The outputs of a plan, [M, width] each; rows of no group are zero.

    Args:
      lhs: rows [M, K], M a multiple of a sublane tile, K one of LANES; or one array of them, `tpu_gather.packed`.
      matrices: [G, K, N], or [G, N, K] with `plan.transpose_rhs`; quantized all or none, and not with that.
      group_sizes_G: int32.
      plan: see there.
      width: of the outputs, a multiple of `tiles.columns`.
      beside: [M, width], for `plan.finish`.
      of_rows: float32 [M, LANES], for `plan.finish`.
      dtype: of the rows, if not that of the matrices.
      index_M: which of the rows of `lhs` is wanted where; with it, they are gathered.
      here: the chip.
      tiles: chosen by plan, shape and chip if None.
      piece: rows that are gathered together, a power of two; `tiles.rows` touches fewer than `tpu_gather.HELD` pieces.
      interpret: as in `tpu.product`.
    """
    scales = [each.scale_G1N for each in matrices if isinstance(each, ScaledMatrices)]
    assert len(scales) in (0, len(matrices))
    assert not (scales and plan.transpose_rhs)
    rhs = [each.values_GKN if isinstance(each, ScaledMatrices) else each for each in matrices]
    depth, dtype = rhs[0].shape[2 if plan.transpose_rhs else 1], dtype or rhs[0].dtype
    call = Call(
        (lhs[0] if index_M is None else index_M).shape[0], rhs[0].shape[0], depth, width,
        len(lhs), len(rhs), len(beside), len(of_rows), index_M is not None, piece, dtype, sublanes(dtype),
        rhs[0].dtype, bool(scales),
    )  # fmt: skip
    tiles = tiles or rows_tiles(plan, call, here)
    inputs = [*lhs, *beside, *of_rows, *rhs, *scales]
    if index_M is not None:
        inputs = [jnp.pad(index_M, (0, -call.rows % piece)).reshape(-1, piece), *inputs]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(tpu_rows_kernel.kernel, plan=plan, call=call, tiles=tiles, cores=here.cores),
        out_shape=[each.shape(call, tiles) for each in plan.outs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(here.cores,),
            in_specs=[anywhere] * len(inputs),
            out_specs=[anywhere] * len(plan.outs),
            scratch_shapes=_scratch(plan, call, tiles),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem_limit(here),
            disable_bounds_checks=call.gathered,  # they cost 14 cycles for each row that is gathered
        ),
        cost_estimate=_cost(plan, call, tiles),
        interpret=interpret,
        name=plan.name,
    )(group_sizes_G, *inputs)


def _cost(plan: Plan, call: Call, tiles: ProductTiles) -> pl.CostEstimate:
    size, products, passes = call.dtype.itemsize, sum(len(part) for part in plan.parts), tiles.passes(call.width)
    matrix = call.width * (call.depth * jnp.dtype(call.rhs_dtype).itemsize + 4 * call.scaled)
    nbytes = len(plan.held) * call.groups * matrix + size * call.depth * call.lhs * passes * call.rows
    nbytes += call.rows * (size * call.beside * call.width + 4 * call.of_rows * passes * LANES)
    for out in plan.outs:
        nbytes += jnp.dtype(out.dtype).itemsize * call.rows * passes * out.columns(tiles)
    flops = 2 * products * call.rows * call.depth * call.width
    return pl.CostEstimate(flops=flops, bytes_accessed=nbytes, transcendentals=0)


def _scratch(plan: Plan, call: Call, tiles: ProductTiles) -> list[Any]:
    """In the order in which the kernel takes them."""
    copies, outs = pltpu.SemaphoreType.DMA, [(each.dtype, each.columns(tiles)) for each in plan.outs]
    passes = tiles.passes(call.width)
    held = (tiles.columns, call.depth) if plan.transpose_rhs else (call.depth, tiles.columns)
    window = (tiles.lhs_slots, tiles.rows)
    if call.gathered:
        rows = tpu_gather.scratch_shapes(call.piece, call.depth * call.dtype.itemsize // 4, call.dtype)
        rows += [pltpu.VMEM((tpu_gather.HELD * call.piece + tiles.block_rows, call.depth), call.dtype)]
    else:
        rows = [pltpu.VMEM((*window, call.depth), call.dtype) for _ in range(call.lhs)]
    return [
        pltpu.SMEM((call.groups,), jnp.int32),
        pltpu.SMEM((tiles.out_slots,), jnp.int32),
        *rows,
        *(pltpu.VMEM((*window, tiles.columns), call.dtype) for _ in range(call.beside)),
        *(pltpu.VMEM((*window, LANES), jnp.float32) for _ in range(call.of_rows)),
        *(pltpu.VMEM((2, *held), call.rhs_dtype) for _ in plan.held),
        *(pltpu.VMEM((2, 1, tiles.columns), jnp.float32) for _ in plan.held if call.scaled),
        *(pltpu.VMEM((tiles.out_slots, tiles.rows, columns), dtype) for dtype, columns in outs),
        *(pltpu.VMEM((call.align, columns), dtype) for dtype, columns in outs),
        *(pltpu.VMEM((ZERO_ROWS, passes * columns), dtype) for dtype, columns in outs),
        copies((tiles.lhs_slots,)),
        copies((2,)),
        copies((tiles.out_slots,)),
        copies,
    ]
