"""Forward and dlhs on TPU: out[rows of group g] = lhs[rows of group g] @ rhs[g].

One program a core. A core takes an equal share of the rows; it reads each group's matrix once, into one of two buffers,
while it multiplies the rows of the group before. Rows come in windows of whole sublane tiles (see `tpu_walk`), some visits
ahead, and only those that are there: what remains of a group is copied and multiplied in a short piece. The results of a
tile that two groups share are put together in VMEM.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu_copies import Outgoing, next_slot, rows_at
from kernels.grouped_matmul.tpu_tiles import Chip, ProductTiles, sublanes, vmem_limit
from kernels.grouped_matmul.tpu_walk import Visit, Walk, ceil_to, floor_to, write_ends

NAME = "grouped_product"
_ZERO_ROWS = 128


def grouped_product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *,
    transpose_rhs: bool, tiles: ProductTiles, here: Chip, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """See `tpu.product`; M, K and N are multiples of the tiles."""
    (rows, depth), groups = lhs_MK.shape, rhs_GKN.shape[0]
    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    held = (tiles.columns, depth) if transpose_rhs else (depth, tiles.columns)
    dtype, align = lhs_MK.dtype, sublanes(lhs_MK.dtype)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    copies = pltpu.SemaphoreType.DMA
    cost = pl.CostEstimate(
        flops=2 * rows * depth * width,
        bytes_accessed=dtype.itemsize * tiles.moved(rows, groups, depth, width),
        transcendentals=0,
    )
    return pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, align=align, transpose_rhs=transpose_rhs, cores=here.cores),
        out_shape=jax.ShapeDtypeStruct((rows, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(here.cores,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=(  # in the order of the kernel's arguments
                pltpu.SMEM((groups,), jnp.int32),
                pltpu.SMEM((tiles.out_slots,), jnp.int32),
                pltpu.VMEM((tiles.lhs_slots, tiles.rows, depth), dtype),
                pltpu.VMEM((2, *held), dtype),
                pltpu.VMEM((tiles.out_slots, tiles.rows, tiles.columns), dtype),
                pltpu.VMEM((align, tiles.columns), dtype),
                pltpu.VMEM((_ZERO_ROWS, width), dtype),
                copies((tiles.lhs_slots,)),
                copies((2,)),
                copies((tiles.out_slots,)),
                copies,
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_limit(here)
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=NAME,
    )(group_sizes_G, lhs_MK, rhs_GKN)  # fmt: skip


def _kernel(
    sizes_G, lhs_MK, rhs_G, out_MN, ends_G, out_sizes_S, lhs_SRK, rhs_S, out_SRN, shared_AN, zero_RN,
    lhs_done_S, rhs_done_S, out_done_S, zero_done, *,
    tiles: ProductTiles, align: int, transpose_rhs: bool, cores: int,
) -> None:  # fmt: skip
    (rows, width), core = out_MN.shape, pl.program_id(0)
    total = write_ends(sizes_G, ends_G, rows)
    first, last = _share(total, core, cores, align)
    walk = Walk(ends_G, first, last, columns=width // tiles.columns, rows=tiles.rows, align=align)

    def columns_of(visit: Visit) -> Any:
        return pl.ds(pl.multiple_of(visit.column * tiles.columns, tiles.columns), tiles.columns)

    def lhs_copy(visit: Visit, slot: Any) -> Any:
        window = rows_at(*walk.window(visit), align)
        source = lhs_MK.at[window]
        return pltpu.make_async_copy(source, lhs_SRK.at[slot, rows_at(0, window.size, align)], lhs_done_S.at[slot])

    def rhs_copy(visit: Visit, slot: Any) -> Any:
        columns = columns_of(visit)
        source = rhs_G.at[visit.group, columns] if transpose_rhs else rhs_G.at[visit.group, :, columns]
        return pltpu.make_async_copy(source, rhs_S.at[slot], rhs_done_S.at[slot])

    def out_copy(slot: Any, size: Any, start: Any = 0, column: Any = 0) -> Any:
        target = out_MN.at[rows_at(start, size, align), columns_of(Visit(column, 0, 0))]
        return pltpu.make_async_copy(out_SRN.at[slot, rows_at(0, size, align)], target, out_done_S.at[slot])

    def fetch(visit: Visit, slot: Any) -> tuple[Visit, Any]:
        """Starts the copy of a visit's rows, if there is such a visit."""

        @pl.when(walk.more(visit))
        def _() -> None:
            lhs_copy(visit, slot).start()

        return walk.after(visit), next_slot(slot, tiles.lhs_slots)

    zero_copies = _write_zeros(out_MN, zero_RN, zero_done, total, core, cores, align)
    outgoing = Outgoing(out_sizes_S, out_copy)
    visit, zero = walk.begin(), jnp.int32(0)
    ahead = (visit, zero)

    @pl.when(walk.more(visit))
    def _() -> None:
        rhs_copy(visit, 0).start()

    for _ahead in range(tiles.lhs_slots - 1):
        ahead = fetch(*ahead)

    def step(carry: tuple) -> tuple:
        visit, ahead, is_new, lhs_slot, rhs_slot, out_slot = carry
        ahead = fetch(*ahead)

        @pl.when(is_new)
        def _() -> None:
            rhs_copy(visit, rhs_slot).wait()
            following = walk.after_group(visit)

            @pl.when(walk.more(following))
            def _() -> None:
                rhs_copy(following, 1 - rhs_slot).start()

        lhs_copy(visit, lhs_slot).wait()
        outgoing.wait(out_slot)
        start, size = walk.window(visit)
        _multiply(
            lhs_SRK.at[lhs_slot],
            rhs_S.at[rhs_slot],
            out_SRN.at[out_slot],
            size,
            tiles=tiles,
            transpose_rhs=transpose_rhs,
        )
        end = walk.end(visit)
        written = _join(out_SRN.at[out_slot], shared_AN, visit.row - start, end - start, end == last, align)
        outgoing.started(out_slot, written)

        @pl.when(written > 0)
        def _() -> None:
            out_copy(out_slot, written, start, visit.column).start()

        following = walk.after(visit)
        is_new = (following.group != visit.group) | (following.column != visit.column)
        return (
            following, ahead, is_new, next_slot(lhs_slot, tiles.lhs_slots),
            jnp.where(is_new, 1 - rhs_slot, rhs_slot), next_slot(out_slot, tiles.out_slots),
        )  # fmt: skip

    lax.while_loop(lambda carry: walk.more(carry[0]), step, (visit, ahead, jnp.bool_(True), zero, zero, zero))
    outgoing.drain()
    zero_copies()


def _share(total: Any, core: Any, cores: int, align: int) -> tuple[Any, Any]:
    """The rows of a core: whole tiles, as many as of any other."""
    if cores == 1:
        return jnp.int32(0), total
    assert cores == 2
    middle = jnp.minimum(ceil_to(total >> 1, align), total)
    return jnp.where(core == 0, 0, middle), jnp.where(core == 0, middle, total)


def _multiply(lhs_RK: Any, rhs: Any, out_RN: Any, rows: Any, *, tiles: ProductTiles, transpose_rhs: bool) -> None:
    """out = lhs @ rhs for the first `rows` rows, rounded up to a multiple of `step_rows`."""
    columns, block = out_RN.shape[1], tiles.block_columns
    numbers = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if lhs_RK.dtype == jnp.float32 else lax.Precision.DEFAULT

    def piece(first: Any, count: int) -> None:
        here = pl.ds(pl.multiple_of(first, tiles.block_rows), count)

        def with_columns(column: Any) -> None:
            there = pl.ds(pl.multiple_of(column, block), block)
            part = rhs[there, :] if transpose_rhs else rhs[:, there]
            product = lax.dot_general(
                lhs_RK[here], part, numbers, precision=precision, preferred_element_type=jnp.float32
            )  # fmt: skip
            out_RN[here, there] = product.astype(out_RN.dtype)

        if block == columns:
            with_columns(0)
        else:
            pl.loop(0, columns, step=block)(with_columns)

    step = tiles.step_rows
    # A remainder that needs as many steps as a block has is one more block.
    blocks = lax.shift_right_logical(rows + step - 1, tiles.block_rows.bit_length() - 1)
    pl.loop(0, blocks)(lambda number: piece(number * tiles.block_rows, tiles.block_rows))
    remainder = rows - blocks * tiles.block_rows
    for count in range(step, tiles.block_rows, step):
        pl.when((remainder > count - step) & (remainder <= count))(
            functools.partial(piece, blocks * tiles.block_rows, count)
        )  # fmt: skip


def _join(out_RN: Any, shared_AN: Any, begin: Any, end: Any, is_last: Any, align: int) -> Any:
    """Puts together what groups have in common: the tile that one ends and another begins in.

    Args:
      out_RN: results of a window, right in rows [begin, end).
      shared_AN: the tile in which the visit before ended, right up to there; then the one in which this visit ends.
      begin: row of the window, in its first tile.
      end: row of the window.
      is_last: whether nobody comes after.
      align: rows of a tile.

    Returns:
      How many rows of the window are ready: all but a tile that the next visit shares.
    """
    row_A1 = lax.broadcasted_iota(jnp.int32, (align, 1), 0)
    top = pl.ds(0, align)

    @pl.when(begin > 0)
    def _() -> None:
        out_RN[top] = jnp.where(row_A1 < begin, shared_AN[...], out_RN[top])

    whole = floor_to(end, align)

    @pl.when(whole < end)
    def _() -> None:
        bottom = pl.ds(pl.multiple_of(whole, align), align)
        tile_AN = out_RN[bottom]
        tile_AN = jnp.where(row_A1 < end - whole, tile_AN, jnp.zeros_like(tile_AN))
        shared_AN[...] = tile_AN
        out_RN[bottom] = tile_AN

    return jnp.where(is_last, ceil_to(end, align), whole)


def _write_zeros(out_MN: Any, zero_RN: Any, done: Any, total: Any, core: Any, cores: int, align: int) -> Any:
    """Starts copies of zeros to the whole tiles that hold no group's rows; returns what waits for them."""
    rows, most = out_MN.shape[0], zero_RN.shape[0]
    first = ceil_to(total, align)
    if cores > 1:
        middle = first + floor_to((rows - first) >> 1, align)
        first, last = jnp.where(core == 0, first, middle), jnp.where(core == 0, middle, rows)
    else:
        last = rows

    def copy(start: Any, size: Any) -> Any:
        return pltpu.make_async_copy(
            zero_RN.at[rows_at(0, size, align)], out_MN.at[rows_at(start, size, align)], done
        )  # fmt: skip

    whole = lax.shift_right_logical(last - first, most.bit_length() - 1)
    rest = last - first - whole * most

    @pl.when(last > first)
    def _() -> None:
        zero_RN[...] = jnp.zeros_like(zero_RN)
        pl.loop(0, whole)(lambda number: copy(first + number * most, most).start())
        pl.when(rest > 0)(lambda: copy(last - rest, rest).start())

    def wait() -> None:
        pl.loop(0, whole)(lambda number: copy(0, most).wait())
        pl.when(rest > 0)(lambda: copy(0, rest).wait())

    return wait
