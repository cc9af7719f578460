"""The two grouped products as Pallas kernels for Hopper (Mosaic GPU), one warpgroup a block, persistent over 132 SMs.

After jax's own `ragged_dot_mgpu` and `transposed_ragged_dot_mgpu` (jax 0.10.2, Apache 2.0), which differ in three things:
tiles begin at each group's first row rounded down to ALIGNMENT, not at multiples of the tile, so that a group computes
half a tile in vain on average, not a whole one; what a tile is of is computed once, not in each tile by a loop over all
groups; and rows of no group may hold anything.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SMS = 132  # of an H100 or H200
ALIGNMENT = 8  # rows of a swizzled tile in shared memory: a copy that begins between them would read other rows
DEPTH = 64  # of a step of the contracted axis: 128 bytes, the widest swizzle
_STEPS = 4  # in flight
_STRIP = 16  # at most so many tiles of the output axis are walked before the next tile of rows: what SMs share is in L2

ROWS, OUTER = "grouped_rows_gpu", "grouped_outer_gpu"  # names of the kernels
PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


class Visits(NamedTuple):
    """Tiles of rows, int32 [V]; those beyond the last have no rows.

    Attributes:
      group: whose matrix.
      block: first row that is read.
      offset: of the first row of the group, from there.
      rows: of the group.
    """

    group: jax.Array
    block: jax.Array
    offset: jax.Array
    rows: jax.Array


def visits(group_sizes_G: jax.Array, rows: int, tile: int) -> Visits:
    """The tiles of `tile` rows that cover all groups of `rows` rows, a multiple of ALIGNMENT, and at least a tile."""
    groups = group_sizes_G.shape[0]
    ends_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    starts_G = ends_G - group_sizes_G
    first_G = starts_G // ALIGNMENT * ALIGNMENT
    counts_G = jnp.where(group_sizes_G > 0, -(-(ends_G - first_G) // tile), 0)
    until_G = jnp.cumsum(counts_G, dtype=jnp.int32)
    visit_V = jnp.arange(most_visits(rows, groups, tile), dtype=jnp.int32)
    group_V = jnp.minimum(jnp.searchsorted(until_G, visit_V, side="right", method="compare_all"), groups - 1)
    group_V = group_V.astype(jnp.int32)
    block_V = first_G[group_V] + (visit_V - (until_G - counts_G)[group_V]) * tile
    own_V = jnp.maximum(starts_G[group_V], block_V)
    rows_V = jnp.where(visit_V < until_G[-1], jnp.minimum(ends_G[group_V], block_V + tile) - own_V, 0)
    block_V = jnp.clip(block_V, 0, rows - tile)  # the last one ends with the array
    return Visits(group_V, block_V, own_V - block_V, rows_V)


def most_visits(rows: int, groups: int, tile: int) -> int:
    """Of any sizes of groups."""
    return (rows + min(groups, rows) * (tile + ALIGNMENT - 2)) // tile


def strip_of(columns: int) -> int:
    """Tiles of the output axis that are walked before the next tile of rows."""
    return max(size for size in range(1, _STRIP + 1) if columns % size == 0)


def _place(index: Any, rows: int, columns: int) -> tuple[Any, Any]:
    """The tile that is walked `index`-th: strips of columns one after the other, each row by row."""
    strip = strip_of(columns)
    inside = jax.lax.rem(index, jnp.int32(strip * rows))
    first = jax.lax.div(index, jnp.int32(strip * rows)) * strip
    return jax.lax.div(inside, jnp.int32(strip)), first + jax.lax.rem(inside, jnp.int32(strip))


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
            visit, column = _place(loop.index[0], *grid)

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
        kernel_name=ROWS,
    )(*tiles, lhs_MK, rhs_GKN)


def _accumulate(lhs: Any, matrix: Any, column: Any, depth: int, transpose_rhs: bool, acc: Any) -> jax.Array:
    """One tile's product with its columns of a matrix."""
    rows_tile, width_tile = acc.shape

    def step(_: Any, lhs_smem: Any, rhs_smem: Any) -> None:
        plgpu.wgmma(acc, lhs_smem, plgpu.transpose_ref(rhs_smem, (1, 0)) if transpose_rhs else rhs_smem)

    right = (width_tile, DEPTH) if transpose_rhs else (DEPTH, width_tile)
    plgpu.emit_pipeline(
        step,
        grid=(depth // DEPTH,),
        in_specs=[
            plgpu.BlockSpec((rows_tile, DEPTH), lambda k: (0, k), delay_release=1),
            plgpu.BlockSpec(right, lambda k: (column, k) if transpose_rhs else (k, column), delay_release=1),
        ],
        max_concurrent_steps=_STEPS,
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


def outer_product(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *, depth_tile: int, width_tile: int,
    interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N]; zero for a group without rows.

    Args:
      lhs_MK: bfloat16 or float16; M is a multiple of DEPTH.
      dout_MN: of the same dtype.
      group_sizes_G: int32.
      depth_tile: rows of an output tile, which divide K.
      width_tile: its columns, which divide N.
      interpret: as in `rows_product`.
    """
    (rows, depth), width = lhs_MK.shape, dout_MN.shape[1]
    groups, grid = group_sizes_G.shape[0], (depth // depth_tile, width // width_tile)
    ends_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    starts_G = ends_G - group_sizes_G
    first_G = starts_G // DEPTH * DEPTH
    steps_G = jnp.where(group_sizes_G > 0, -(-(ends_G - first_G) // DEPTH), 0)
    # Fixed, not inferred: the masks below rewrite tiles in shared memory.
    transforms = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))

    def body(first_G, start_G, end_G, steps_G, lhs, dout, out) -> None:  # type: ignore[no-untyped-def]
        @plgpu.nd_loop((groups, grid[0] * grid[1]), collective_axes="sm")
        def _(loop: plgpu.NDLoopInfo) -> None:
            group = loop.index[0]
            row, column = _place(loop.index[1], *grid)
            first = pl.multiple_of(first_G[group], DEPTH)
            before, steps = start_G[group] - first, steps_G[group]
            behind = end_G[group] - first - (steps - 1) * DEPTH

            def accumulate(acc: Any) -> jax.Array:
                def step(index: Any, lhs_smem: Any, dout_smem: Any) -> None:
                    @pl.when(index[0] == 0)
                    def _() -> None:  # rows of the group before: of one operand is enough, they are finite
                        _keep_rows(lhs_smem, lambda row: row >= before)

                    @pl.when(index[0] == steps - 1)
                    def _() -> None:  # rows of the group behind, or of none, which may be NaN
                        _keep_rows(lhs_smem, lambda row: row < behind)
                        _keep_rows(dout_smem, lambda row: row < behind)

                    plgpu.wgmma(acc, plgpu.transpose_ref(lhs_smem, (1, 0)), dout_smem)

                @pl.when(steps > 0)
                def _() -> None:
                    specs = [
                        plgpu.BlockSpec(
                            (DEPTH, tile), functools.partial(_at, place), delay_release=1, transforms=transforms
                        )
                        for tile, place in ((depth_tile, row), (width_tile, column))
                    ]
                    # Slices may end behind the arrays; the steps do not.
                    window = pl.ds(first, rows)
                    plgpu.emit_pipeline(step, grid=(steps,), in_specs=specs, max_concurrent_steps=_STEPS)(
                        lhs.at[window, :], dout.at[window, :]
                    )

                return acc[...]

            acc = pl.run_scoped(accumulate, plgpu.ACC((depth_tile, width_tile)))

            @functools.partial(
                pl.run_scoped, out_smem=plgpu.SMEM((depth_tile, width_tile), dtype=out.dtype, transforms=transforms)
            )
            def _(out_smem: Any) -> None:
                out_smem[...] = acc.astype(out_smem.dtype)
                plgpu.commit_smem()
                place = (pl.ds(row * depth_tile, depth_tile), pl.ds(column * width_tile, width_tile))
                plgpu.copy_smem_to_gmem(out_smem, out.at[(group, *place)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((groups, depth, width), lhs_MK.dtype),
        grid=(min(SMS, groups * grid[0] * grid[1]),),
        grid_names=("sm",),
        compiler_params=PARAMETERS,
        interpret=interpret,
        kernel_name=OUTER,
    )(first_G, starts_G, ends_G, steps_G, lhs_MK, dout_MN)


def _at(place: Any, step: Any) -> tuple[Any, Any]:
    return step, place


def _keep_rows(tile: Any, kept: Any) -> None:
    """Sets the other rows of a tile to zero."""
    values = tile[...]
    row = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0), plgpu.Layout.WGMMA)
    tile[...] = jnp.where(kept(row), values, jnp.zeros_like(values))
    plgpu.commit_smem()
