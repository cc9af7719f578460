"""Forward and dlhs on Hopper (Mosaic GPU): out[rows of group g] = lhs[rows of group g] @ rhs[g].

One warpgroup a block, persistent over 132 SMs. After jax's own `ragged_dot_mgpu` (jax 0.10.2, Apache 2.0), which differs
in three things: tiles begin at each group's first row rounded down to ALIGNMENT, not at multiples of the tile, so that a
group computes half a tile in vain on average, not a whole one; what a tile is of is computed once, not in each tile by a
loop over all groups; and rows of no group may hold anything.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.grouped_matmul.gpu_tiles import ALIGNMENT, DEPTH, PARAMETERS, SMS, STEPS, place_of, visits

NAME = "grouped_product_gpu"


def rows_product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *, rows_tile: int, width_tile: int,
    transpose_rhs: bool, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m]; rows of no group are not written.

    Args:
      lhs_MK: bfloat16 or float16; M is a multiple of ALIGNMENT and at least `rows_tile`, K one of DEPTH.
      rhs_GKN: of the same dtype; [G, N, K] with `transpose_rhs`.
      group_sizes_G: int32.
      rows_tile: rows of a tile, a power of two from 64 on.
      width_tile: output columns of a tile, which divide N.
      transpose_rhs: see above.
      interpret: Pallas' parameters of interpret mode, or None.
    """
    rows, depth = lhs_MK.shape
    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    tiles = visits(group_sizes_G, rows, rows_tile)
    grid = (tiles.group.shape[0], width // width_tile)

    def body(group_V, block_V, offset_V, rows_V, lhs, rhs, out) -> None:  # type: ignore[no-untyped-def]
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
        def _(loop: plgpu.NDLoopInfo) -> None:
            visit, column = place_of(loop.index[0], *grid)

            @pl.when(rows_V[visit] > 0)
            def _() -> None:
                block = pl.multiple_of(block_V[visit], ALIGNMENT)
                lhs_tile, matrix = lhs.at[pl.ds(block, rows_tile), :], rhs.at[group_V[visit]]
                acc = pl.run_scoped(
                    functools.partial(_accumulate, lhs_tile, matrix, column, depth, transpose_rhs),
                    plgpu.ACC((rows_tile, width_tile)),
                )

                @functools.partial(pl.run_scoped, out_smem=plgpu.SMEM((rows_tile, width_tile), dtype=out.dtype))
                def _(out_smem: Any) -> None:
                    out_smem[...] = acc.astype(out_smem.dtype)
                    plgpu.commit_smem()
                    columns = out.at[:, pl.ds(column * width_tile, width_tile)]
                    _store_rows(out_smem, columns, block, offset_V[visit], rows_V[visit])

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, width), lhs_MK.dtype),
        grid=(min(SMS, grid[0] * grid[1]),),
        grid_names=("sm",),
        compiler_params=PARAMETERS,
        interpret=interpret,
        kernel_name=NAME,
    )(*tiles, lhs_MK, rhs_GKN)


def _accumulate(lhs: Any, matrix: Any, column: Any, depth: int, transpose_rhs: bool, acc: Any) -> jax.Array:
    """One tile's product with its columns of a matrix."""
    rows_tile, width_tile = acc.shape

    def step(_: Any, lhs_smem: Any, rhs_smem: Any) -> None:
        plgpu.wgmma(acc, lhs_smem, plgpu.transpose_ref(rhs_smem, (1, 0)) if transpose_rhs else rhs_smem)
        plgpu.wgmma_wait(1)  # the tiles of the step before are copied over next (delay_release)

    right = (width_tile, DEPTH) if transpose_rhs else (DEPTH, width_tile)
    plgpu.emit_pipeline(
        step,
        grid=(depth // DEPTH,),
        in_specs=[
            plgpu.BlockSpec((rows_tile, DEPTH), lambda k: (0, k), delay_release=1),
            plgpu.BlockSpec(right, lambda k: (column, k) if transpose_rhs else (k, column), delay_release=1),
        ],
        max_concurrent_steps=STEPS,
    )(lhs, matrix)
    return acc[...]


def _store_rows(out_smem: Any, out: Any, block: Any, offset: Any, rows: Any) -> None:
    """Copies rows [offset, offset + rows) of a tile: copies have static sizes, so one for each power of two in `rows`."""
    size = out_smem.shape[0]
    while size > 0:
        copied = functools.partial(_copy_rows, out_smem, out, block, offset, size)
        pl.when(rows & size != 0)(copied)
        offset = offset + (rows & size)
        size //= 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _copy_rows(out_smem: Any, out: Any, block: Any, offset: Any, size: int) -> None:
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(offset, size)], out.at[pl.ds(block + offset, size), :])
