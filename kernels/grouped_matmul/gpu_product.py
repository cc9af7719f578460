"""Forward and dlhs on Hopper (Mosaic GPU): out[rows of group g] = lhs[rows of group g] @ rhs[g].

One block an SM walks over tiles of 128 rows and up to 256 columns. A warpgroup copies, two multiply, each one half:

        rhs[g]              64 x 256 columns   (4 steps of K are in shared memory or on their way)
                            ================
     lhs   128 x 64  ||     64 rows: warpgroup 0        tiles begin at a group's first row, rounded down to 8;
           of K      ||     64 rows: warpgroup 1        rows of other groups are computed, and not written

After jax's own `ragged_dot_mgpu` (jax 0.10.2, Apache 2.0), in which one warpgroup does everything, tiles begin at multiples
of the tile, so that a group computes a whole tile in vain on average, not half of one, every tile looks for its group among
all of them, and a tile of shared memory may be copied over while it is multiplied. The pipeline is that of jax's
`hopper_matmul_mgpu`. Rows of no group may hold anything.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.grouped_matmul.gpu_tiles import ALIGNMENT, DEPTH, PARAMETERS, SMS, STEPS, SWIZZLED, place_of, visits

NAME = "grouped_product_gpu"
_WARPGROUPS = 2  # that multiply
_WGMMA_ROWS = 64
_PIECE = 128  # columns of a result that are in shared memory at a time


def rows_product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *, rows_tile: int, width_tile: int,
    transpose_rhs: bool, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m]; rows of no group are not written.

    Args:
      lhs_MK: bfloat16 or float16; M is a multiple of ALIGNMENT and at least `rows_tile`, K one of DEPTH.
      rhs_GKN: of the same dtype; [G, N, K] with `transpose_rhs`.
      group_sizes_G: int32.
      rows_tile: rows of a tile, 64 or 128.
      width_tile: output columns of a tile, which divide N: 64, 128 or 256; not 64 with 64 rows.
      transpose_rhs: see above.
      interpret: Pallas' parameters of interpret mode, or None.
    """
    rows, depth = lhs_MK.shape
    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    tiles = visits(group_sizes_G, rows, rows_tile)
    grid = (tiles.group.shape[0], width // width_tile)
    by_rows = rows_tile > _WGMMA_ROWS
    half = (rows_tile // 2, width_tile) if by_rows else (rows_tile, width_tile // 2)
    piece = min(_PIECE, half[1])

    def body(group_V, block_V, offset_V, rows_V, lhs, rhs, out) -> None:  # type: ignore[no-untyped-def]
        warpgroup = jax.lax.axis_index("wg")
        row, column = (warpgroup * half[0], 0) if by_rows else (0, warpgroup * half[1])  # where the own half begins
        pipeline = _pipeline(
            functools.partial(_multiply, row, column, half, transpose_rhs), depth, rows_tile, width_tile, transpose_rhs
        )

        def walk(allocations: Any, out_smem: Any) -> None:
            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="sm")
            def _(loop: plgpu.NDLoopInfo) -> None:
                visit, tile = place_of(loop.index[0], *grid)

                @pl.when(rows_V[visit] > 0)
                def _() -> None:
                    block = pl.multiple_of(block_V[visit], ALIGNMENT)
                    columns = pl.ds(tile * width_tile, width_tile)
                    matrix = rhs.at[group_V[visit]]
                    right = matrix.at[columns, :] if transpose_rhs else matrix.at[:, columns]
                    first = jnp.clip(offset_V[visit] - row, 0, half[0])
                    count = jnp.clip(offset_V[visit] + rows_V[visit] - row, 0, half[0]) - first

                    def multiply_and_store(run: Any) -> None:
                        @functools.partial(pl.run_scoped, acc=plgpu.ACC(half))
                        def _(acc: Any) -> None:
                            run(acc)
                            result = acc[...].astype(out.dtype)
                            for start in range(0, half[1], piece):
                                to = out.at[:, pl.ds(tile * width_tile + column + start, piece)]
                                _store(
                                    result[:, start : start + piece],
                                    out_smem.at[warpgroup],
                                    to,
                                    block + row,
                                    first,
                                    count,
                                )

                    pipeline(multiply_and_store)(lhs.at[pl.ds(block, rows_tile), :], right, allocations=allocations)

        right = rhs.at[0]
        allocations = pipeline(_nothing).get_allocations(lhs, right)
        # The last results leave before the kernel ends.
        pl.run_scoped(
            walk, allocations=allocations, out_smem=plgpu.SMEM((_WARPGROUPS, half[0], piece), dtype=out.dtype),
            collective_axes="wg",
        )  # fmt: skip
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, width), lhs_MK.dtype),
        grid=(min(SMS, grid[0] * grid[1]),),
        grid_names=("sm",),
        num_threads=_WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=PARAMETERS,
        interpret=interpret,
        kernel_name=NAME,
    )(*tiles, lhs_MK, rhs_GKN)


def _nothing(*_: Any) -> None:
    """What is allocated does not depend on the computation."""


def _pipeline(step: Any, depth: int, rows_tile: int, width_tile: int, transpose_rhs: bool) -> Any:
    """Of the computation, what runs it beside a warpgroup that copies the next steps of the contracted axis."""
    right = (width_tile, DEPTH) if transpose_rhs else (DEPTH, width_tile)
    specs = [
        plgpu.BlockSpec(shape, lambda k, axis=axis: (0, k) if axis else (k, 0), transforms=SWIZZLED)
        for shape, axis in (((rows_tile, DEPTH), 1), (right, int(transpose_rhs)))
    ]

    def of(compute: Any) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            step, grid=(depth // DEPTH,), in_specs=specs, max_concurrent_steps=STEPS, compute_context=compute,
            memory_registers=40, wg_axis="wg", num_compute_wgs=_WARPGROUPS,
        )  # fmt: skip

    return of


def _multiply(
    row: Any, column: Any, half: tuple[int, int], transpose_rhs: bool, _: Any, lhs_smem: Any, rhs_smem: Any, acc: Any
) -> Any:
    """One warpgroup's half of a tile, for one step of the contracted axis."""
    columns = pl.ds(column, half[1])
    right = plgpu.transpose_ref(rhs_smem.at[columns, :], (1, 0)) if transpose_rhs else rhs_smem.at[:, columns]
    plgpu.wgmma(acc, lhs_smem.at[pl.ds(row, half[0]), :], right)
    plgpu.wgmma_wait(0)  # the pipeline may copy over these tiles now; the other warpgroup keeps the tensor cores busy
    return acc


def _store(result: Any, out_smem: Any, out: Any, block: Any, first: Any, count: Any) -> None:
    """Writes rows [first, first + count): copies have static sizes, so one for each power of two in `count`."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    out_smem[...] = result
    plgpu.commit_smem()
    size = out_smem.shape[0]
    while size > 0:
        copied = functools.partial(_copy_rows, out_smem, out, block, first, size)
        pl.when(count & size != 0)(copied)
        first = first + (count & size)
        size //= 2


def _copy_rows(out_smem: Any, out: Any, block: Any, first: Any, size: int) -> None:
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(first, size)], out.at[pl.ds(block + first, size), :])
