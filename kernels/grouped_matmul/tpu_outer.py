"""drhs on TPU: out[g] = lhs[rows of group g]^T @ dout[rows of group g].

One program a core, each for its share of the gradients' rows (of K), or of their columns, so that all have the same work.
A window's products are added to a float32 sum in VMEM while they leave the matrix units, and written in the output's dtype
beside it; when the group ends, that copy goes to HBM while the next group is summed in another. Rows of a window that are
another group's count as zeros in both operands, since zero times NaN is NaN: those behind while they are read, those in
front in VMEM, where the group's last rows take their place if they fit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu_copies import Outgoing, next_slot, rows_at
from kernels.grouped_matmul.tpu_tiles import LANES, OUTER_BODY, Chip, OuterTiles, divisors, sublanes, vmem_limit
from kernels.grouped_matmul.tpu_walk import Visit, Walk, floor_to, write_ends

NAME = "grouped_outer"
_ZERO_ROWS = 128
_OUT_SLOTS = 2
_PIECE = 128  # rows: the matrix unit's depth
_ANY = Visit(0, 0, 0)


def grouped_outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *,
    tiles: OuterTiles, here: Chip, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `tpu.outer`; M, K and N are multiples of the tiles."""
    (rows, depth), width, groups = lhs_MK.shape, dout_MN.shape[1], group_sizes_G.shape[0]
    dtype, align = lhs_MK.dtype, sublanes(lhs_MK.dtype)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    copies = pltpu.SemaphoreType.DMA
    cost = pl.CostEstimate(
        flops=2 * rows * depth * width,
        bytes_accessed=dtype.itemsize
        * (rows * (depth * (width // tiles.columns) + width * (depth // tiles.depth)) + groups * depth * width),
        transcendentals=0,
    )
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, align=align),
        out_shape=jax.ShapeDtypeStruct((groups, depth, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles.depth_parts * tiles.column_parts,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=(  # in the order of the kernel's arguments
                pltpu.SMEM((groups,), jnp.int32),
                pltpu.SMEM((_OUT_SLOTS,), jnp.int32),
                pltpu.VMEM((tiles.slots, tiles.rows, tiles.depth), dtype),
                pltpu.VMEM((tiles.slots, tiles.rows, tiles.columns), dtype),
                pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32),
                pltpu.VMEM((_OUT_SLOTS, tiles.depth, tiles.columns), dtype),
                pltpu.VMEM((_ZERO_ROWS, width // tiles.column_parts), dtype),
                copies((tiles.slots,)),
                copies((tiles.slots,)),
                copies((_OUT_SLOTS,)),
                copies,
            ),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(here)),
        cost_estimate=cost,
        interpret=interpret,
        name=NAME,
    )(group_sizes_G, lhs_MK, dout_MN)


def _kernel(
    sizes_G, lhs_MK, dout_MN, out_GKN, ends_G, out_sizes_S, lhs_SRK, dout_SRN, sum_KN, out_SKN, zero_RN,
    lhs_done_S, dout_done_S, out_done_S, zero_done, *, tiles: OuterTiles, align: int,
) -> None:  # fmt: skip
    rows, (_, depth, width) = lhs_MK.shape[0], out_GKN.shape
    deep, wide = depth // tiles.depth_parts, width // tiles.column_parts  # this core's part of a gradient
    core = pl.program_id(0)
    first_row = core * deep if tiles.depth_parts > 1 else 0
    first_column = core * wide if tiles.column_parts > 1 else 0
    down, across = deep // tiles.depth, wide // tiles.columns  # tiles of the part
    total = write_ends(sizes_G, ends_G, rows)
    walk = Walk(ends_G, jnp.int32(0), total, columns=down * across, rows=tiles.rows, align=align)

    def depth_of(visit: Visit) -> Any:
        place = visit.column if across == 1 else lax.div(visit.column, jnp.int32(across))
        return pl.ds(pl.multiple_of(first_row + place * tiles.depth, LANES), tiles.depth)

    def columns_of(visit: Visit) -> Any:
        place: Any = 0 if across == 1 else lax.rem(visit.column, jnp.int32(across))
        return pl.ds(pl.multiple_of(first_column + place * tiles.columns, LANES), tiles.columns)

    def in_copies(visit: Visit, slot: Any) -> tuple[Any, Any]:
        window = rows_at(*walk.window(visit), align)
        held = rows_at(0, window.size, align)
        lhs, dout = lhs_MK.at[window, depth_of(visit)], dout_MN.at[window, columns_of(visit)]
        return (
            pltpu.make_async_copy(lhs, lhs_SRK.at[slot, held], lhs_done_S.at[slot]),
            pltpu.make_async_copy(dout, dout_SRN.at[slot, held], dout_done_S.at[slot]),
        )

    def out_copy(slot: Any, _: Any, visit: Visit = _ANY) -> Any:
        return pltpu.make_async_copy(
            out_SKN.at[slot], out_GKN.at[visit.group, depth_of(visit), columns_of(visit)], out_done_S.at[slot]
        )

    def fetch(visit: Visit, slot: Any) -> tuple[Visit, Any]:
        """Starts the copies of a visit's rows, if there is such a visit."""

        @pl.when(walk.more(visit))
        def _() -> None:
            for copy in in_copies(visit, slot):
                copy.start()

        return walk.after(visit), next_slot(slot, tiles.slots)

    outgoing = Outgoing(out_sizes_S, out_copy)
    visit, zero = walk.begin(), jnp.int32(0)
    ahead = (visit, zero)
    for _ahead in range(tiles.slots - 1):
        ahead = fetch(*ahead)
    zero_copies = _write_zeros(sizes_G, out_GKN, zero_RN, zero_done, (first_row, deep), (first_column, wide))

    def step(carry: tuple) -> tuple:
        visit, ahead, is_new, slot, out_slot = carry
        ahead = fetch(*ahead)
        for copy in in_copies(visit, slot):
            copy.wait()
        start = floor_to(visit.row, align)
        operands = lhs_SRK.at[slot], dout_SRN.at[slot]
        held = _close_up(operands, visit.row - start, walk.end(visit) - start, align)
        pl.when(is_new)(lambda: outgoing.wait(out_slot))
        _add(*operands, sum_KN, out_SKN.at[out_slot], held, is_new, block=tiles.block_depth)
        following = walk.after(visit)
        is_over = (following.group != visit.group) | (following.column != visit.column)

        @pl.when(is_over)
        def _() -> None:
            out_copy(out_slot, 1, visit).start()
            outgoing.started(out_slot, 1)

        out_slot = jnp.where(is_over, next_slot(out_slot, _OUT_SLOTS), out_slot)
        return following, ahead, is_over, next_slot(slot, tiles.slots), out_slot

    lax.while_loop(lambda carry: walk.more(carry[0]), step, (visit, ahead, jnp.bool_(True), zero, zero))
    outgoing.drain()
    zero_copies()


def _close_up(operands: Sequence[Any], begin: Any, end: Any, align: int) -> Any:
    """Zeros in rows [0, begin), less than a tile, or else what the last tile holds, where that has room there.

    A group that begins inside a tile then needs no more tiles than one that does not. The order of rows does not matter
    to a sum over them, as long as both operands have the same.

    Args:
      operands: of one window, right in rows [begin, end).
      begin: row of the window, in its first tile.
      end: row of the window.
      align: rows of a tile.

    Returns:
      The row before which both operands are right; what lies behind is anything.
    """
    row_A1 = lax.broadcasted_iota(jnp.int32, (align, 1), 0)
    last = floor_to(end - 1, align)
    behind = end - last  # rows of the last tile, 1 to `align`
    moves = (last > 0) & (behind <= begin)
    count = jnp.where(moves, behind, 0)
    top, bottom = pl.ds(0, align), pl.ds(pl.multiple_of(last, align), align)

    @pl.when(begin > 0)
    def _() -> None:
        for rows_RN in operands:
            moved_AN = jnp.where(row_A1 < count, rows_RN[bottom], jnp.zeros((), rows_RN.dtype))
            rows_RN[top] = jnp.where(row_A1 >= begin, rows_RN[top], moved_AN)

    return jnp.where(moves, last, end)


def _add(
    lhs_RK: Any, dout_RN: Any, sum_KN: Any, out_KN: Any, rows: Any, is_first: Any, *, block: int
) -> None:  # fmt: skip
    """out = sum = (is_first ? 0 : sum) + lhs^T dout, over `rows` rows, and zeros up to whole pieces."""
    (most, columns), depth = dout_RN.shape, lhs_RK.shape[1]
    precision = lax.Precision.HIGHEST if lhs_RK.dtype == jnp.float32 else lax.Precision.DEFAULT

    def held(x_RN: Any, count: int, there: Any = slice(None)) -> Any:
        """`count` rows, of which those of the last piece that are not there are zero: free, beside the products."""
        whole = count - _PIECE
        row_P1 = lax.broadcasted_iota(jnp.int32, (_PIECE, 1), 0)
        last_PN = jnp.where(row_P1 < rows - whole, x_RN[pl.ds(whole, _PIECE), there], jnp.zeros((), x_RN.dtype))
        return jnp.concatenate([x_RN[pl.ds(0, whole), there], last_PN]) if whole else last_PN

    def over(count: int) -> None:
        # Few rows: more of the depth in one piece of code. All pieces are compiled, so rarer ones are not as large.
        size = block * most * columns
        size = size if count > most - 2 * _PIECE else min(size, OUTER_BODY // 2)
        deep = next((each for each in divisors(depth) if each * count * columns <= size), LANES)

        def with_depth(first: Any) -> None:
            here = pl.ds(pl.multiple_of(first, deep), deep)
            product_KN = lax.dot_general(
                held(lhs_RK, count, here), held(dout_RN, count), (((0,), (0,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            total_KN = product_KN + jnp.where(is_first, 0.0, sum_KN[here])
            sum_KN[here] = total_KN
            out_KN[here] = total_KN.astype(out_KN.dtype)

        if deep == depth:
            with_depth(0)
        else:
            pl.loop(0, depth, step=deep)(with_depth)

    for count in range(_PIECE, most + 1, _PIECE):
        pl.when((rows > count - _PIECE) & (rows <= count))(functools.partial(over, count))


def _write_zeros(sizes_G: Any, out_GKN: Any, zero_RN: Any, done: Any, deep: Any, wide: Any) -> Any:
    """Starts copies of zeros to the gradients of groups without rows; returns what waits for them.

    Args:
      deep: first row and number of rows of a gradient that are this core's.
      wide: the same of columns.
    """
    groups, rows, (first, depth) = out_GKN.shape[0], zero_RN.shape[0], deep
    columns = pl.ds(pl.multiple_of(wide[0], LANES), wide[1])
    zero_RN[...] = jnp.zeros_like(zero_RN)

    def copy(group: Any, row: Any) -> Any:
        here = pl.ds(pl.multiple_of(first + row, rows), rows)
        return pltpu.make_async_copy(zero_RN, out_GKN.at[group, here, columns], done)

    def fill(group: Any, count: Any) -> Any:
        is_empty = sizes_G[group] == 0

        @pl.when(is_empty)
        def _() -> None:
            pl.loop(0, depth, step=rows)(lambda row: copy(group, row).start())

        return count + is_empty.astype(jnp.int32)

    empty = lax.fori_loop(0, groups, fill, jnp.int32(0))

    def wait() -> None:
        @pl.loop(0, empty)
        def _(_: Any) -> None:
            pl.loop(0, depth, step=rows)(lambda row: copy(0, row).wait())

    return wait
