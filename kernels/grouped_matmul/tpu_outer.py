"""drhs on TPU: out[g] = lhs[rows of group g]^T @ dout[rows of group g].

One program a core, each for its share of the gradients' rows (of K), so that all have the same work. A window's products
are added to a float32 sum in VMEM while they leave the matrix units, and written in the output's dtype beside it; when the
group ends, that copy goes to HBM while the next group is summed in another. Rows of a window that are another group's are
set to zero in VMEM first, in both operands, since zero times NaN is NaN: at most a matrix unit's depth of them.
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
from kernels.grouped_matmul.tpu_tiles import Chip, OuterTiles, divisors, sublanes, vmem_limit
from kernels.grouped_matmul.tpu_walk import Visit, Walk, ceil_to, floor_to, write_ends

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
        functools.partial(_kernel, tiles=tiles, align=align, cores=here.cores),
        out_shape=jax.ShapeDtypeStruct((groups, depth, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(here.cores,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=(  # in the order of the kernel's arguments
                pltpu.SMEM((groups,), jnp.int32),
                pltpu.SMEM((_OUT_SLOTS,), jnp.int32),
                pltpu.VMEM((tiles.slots, tiles.rows, tiles.depth), dtype),
                pltpu.VMEM((tiles.slots, tiles.rows, tiles.columns), dtype),
                pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32),
                pltpu.VMEM((_OUT_SLOTS, tiles.depth, tiles.columns), dtype),
                pltpu.VMEM((_ZERO_ROWS, width), dtype),
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
    lhs_done_S, dout_done_S, out_done_S, zero_done, *, tiles: OuterTiles, align: int, cores: int,
) -> None:  # fmt: skip
    (rows, depth), core = lhs_MK.shape, pl.program_id(0)
    own = depth // cores  # of the gradients' rows
    deep, wide = own // tiles.depth, dout_MN.shape[1] // tiles.columns  # tiles of a gradient
    total = write_ends(sizes_G, ends_G, rows)
    walk = Walk(ends_G, jnp.int32(0), total, columns=deep * wide, rows=tiles.rows, align=align)

    def depth_of(visit: Visit) -> Any:
        place = visit.column if wide == 1 else lax.div(visit.column, jnp.int32(wide))
        return pl.ds(pl.multiple_of(core * own + place * tiles.depth, tiles.depth), tiles.depth)

    def columns_of(visit: Visit) -> Any:
        place: Any = 0 if wide == 1 else lax.rem(visit.column, jnp.int32(wide))
        return pl.ds(pl.multiple_of(place * tiles.columns, tiles.columns), tiles.columns)

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
    zero_copies = _write_zeros(sizes_G, out_GKN, zero_RN, zero_done, core * own, own)

    def step(carry: tuple) -> tuple:
        visit, ahead, is_new, slot, out_slot = carry
        ahead = fetch(*ahead)
        for copy in in_copies(visit, slot):
            copy.wait()
        start, end = floor_to(visit.row, align), walk.end(visit)
        for rows_RN in (lhs_SRK.at[slot], dout_SRN.at[slot]):
            _clear(rows_RN, visit.row - start, end - start, align)
        pl.when(is_new)(lambda: outgoing.wait(out_slot))
        _add(
            lhs_SRK.at[slot],
            dout_SRN.at[slot],
            sum_KN,
            out_SKN.at[out_slot],
            end - start,
            is_new,
            block=tiles.block_depth,
        )
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


def _clear(rows_RN: Any, begin: Any, end: Any, align: int) -> None:
    """Zeros in rows [0, begin), less than a tile, and from `end` to the next multiple of the matrix unit's depth."""
    row_A1 = lax.broadcasted_iota(jnp.int32, (align, 1), 0)

    def tile(first: Any, keep_A1: Any) -> None:
        here = pl.ds(pl.multiple_of(first, align), align)
        rows_RN[here] = jnp.where(keep_A1, rows_RN[here], jnp.zeros((), rows_RN.dtype))

    pl.when(begin > 0)(lambda: tile(0, row_A1 >= begin))
    whole = floor_to(end, align)
    pl.when(whole < end)(lambda: tile(whole, row_A1 < end - whole))
    first = ceil_to(end, align)
    zeros_AN = jnp.zeros((align, rows_RN.shape[1]), rows_RN.dtype)

    @pl.loop(0, lax.shift_right_logical(ceil_to(end, _PIECE) - first, align.bit_length() - 1))
    def _(number: Any) -> None:
        rows_RN[pl.ds(pl.multiple_of(first + number * align, align), align)] = zeros_AN


def _add(
    lhs_RK: Any, dout_RN: Any, sum_KN: Any, out_KN: Any, rows: Any, is_first: Any, *, block: int
) -> None:  # fmt: skip
    """out = sum = (is_first ? 0 : sum) + lhs^T dout, over `rows` rows rounded up to whole pieces."""
    depth = lhs_RK.shape[1]
    precision = lax.Precision.HIGHEST if lhs_RK.dtype == jnp.float32 else lax.Precision.DEFAULT
    most = lhs_RK.shape[0]

    def over(count: int) -> None:
        # Few rows: more of the depth in one piece of code, so that all pieces are about as large.
        deep = next(each for each in divisors(depth) if each * count <= block * most)

        def with_depth(first: Any) -> None:
            here = pl.ds(pl.multiple_of(first, deep), deep)
            product_KN = lax.dot_general(
                lhs_RK[pl.ds(0, count), here], dout_RN[pl.ds(0, count)], (((0,), (0,)), ((), ())),
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


def _write_zeros(sizes_G: Any, out_GKN: Any, zero_RN: Any, done: Any, first: Any, depth: int) -> Any:
    """Starts copies of zeros to the gradients of groups without rows; returns what waits for them."""
    groups, rows = out_GKN.shape[0], zero_RN.shape[0]
    zero_RN[...] = jnp.zeros_like(zero_RN)

    def copy(group: Any, row: Any) -> Any:
        return pltpu.make_async_copy(zero_RN, out_GKN.at[group, pl.ds(pl.multiple_of(first + row, rows), rows)], done)

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
