"""The kernel of `tpu_rows`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import tpu_gather
from kernels.grouped_matmul.tpu_copies import Outgoing, Together, next_slot, rows_at
from kernels.grouped_matmul.tpu_join import join, write_zeros
from kernels.grouped_matmul.tpu_plan import Call, Plan
from kernels.grouped_matmul.tpu_tiles import LANES, ProductTiles
from kernels.grouped_matmul.tpu_walk import Visit, Walk, ceil_to, write_ends


class _Refs:
    """The kernel's references by what they are, in the order of `tpu_rows.grouped_rows`."""

    def __init__(self, refs: Sequence[Any], plan: Plan, call: Call) -> None:
        left = iter(refs)

        def take(count: int) -> list[Any]:
            return [next(left) for _ in range(count)]

        outs = len(plan.outs)
        self.index = take(1 if call.gathered else 0)
        self.lhs, self.beside, self.of_rows, self.rhs, self.scales = (
            take(count) for count in (call.lhs, call.beside, call.of_rows, call.rhs, call.rhs * call.scaled)
        )  # fmt: skip
        # A packed output without its axis of one.
        self.outs = [ref.at[:, 0] if out.is_packed else ref for ref, out in zip(take(outs), plan.outs, strict=True)]
        self.ends_G, self.out_sizes_S = take(2)
        self.gather = take(tpu_gather.SCRATCHES + 1 if call.gathered else 0)
        self.lhs_held = take(0 if call.gathered else call.lhs)
        self.beside_held, self.of_rows_held = take(call.beside), take(call.of_rows)
        held = len(plan.held)
        self.rhs_held, self.scales_held, self.outs_held, self.shared, self.zeros = (
            take(count) for count in (held, held * call.scaled, outs, outs, outs)
        )
        self.rows_done_S, self.rhs_done_S, self.out_done_S, self.zero_done = take(4)


class _Copies:
    """Between HBM and VMEM, of visits."""

    def __init__(self, refs: _Refs, walk: Walk, plan: Plan, call: Call, tiles: ProductTiles) -> None:
        self._refs, self._walk, self._plan, self._call, self._tiles = refs, walk, plan, call, tiles
        self.any_rows = bool(refs.lhs_held or refs.beside or refs.of_rows)

    def _columns(self, visit: Visit, offset: int = 0, width: int | None = None) -> Any:
        width = width or self._tiles.columns
        return pl.ds(pl.multiple_of(offset + visit.column * width, LANES), width)

    def rows(self, visit: Visit, slot: Any) -> Together:
        """Of all that has windows."""
        refs, align = self._refs, self._call.align
        window = rows_at(*self._walk.window(visit), align)
        pairs = [(source.at[window], held) for source, held in zip(refs.lhs, refs.lhs_held, strict=False)]
        pairs += [
            (source.at[window, self._columns(visit)], held)
            for source, held in zip(refs.beside, refs.beside_held, strict=True)
        ]
        pairs += [(source.at[window], held) for source, held in zip(refs.of_rows, refs.of_rows_held, strict=True)]
        there = rows_at(0, window.size, align)
        return Together(
            pltpu.make_async_copy(source, held.at[slot, there], refs.rows_done_S.at[slot]) for source, held in pairs
        )

    def rhs(self, visit: Visit, slot: Any) -> Together:
        """Of a group's matrices."""

        def source(matrix: int, offset: int) -> Any:
            ref, here = self._refs.rhs[matrix], self._columns(visit, offset)
            return ref.at[visit.group, here] if self._plan.transpose_rhs else ref.at[visit.group, :, here]

        def scale(matrix: int, offset: int) -> Any:
            return self._refs.scales[matrix].at[visit.group, :, self._columns(visit, offset)]

        pairs = [(source(*which), held) for which, held in zip(self._plan.held, self._refs.rhs_held, strict=True)]
        if self._refs.scales:
            pairs += [
                (scale(*which), held) for which, held in zip(self._plan.held, self._refs.scales_held, strict=True)
            ]
        return Together(
            pltpu.make_async_copy(source, held.at[slot], self._refs.rhs_done_S.at[slot]) for source, held in pairs
        )

    def outs(self, slot: Any, size: Any, start: Any = 0, column: Any = 0) -> Together:
        """Of a window's results."""
        refs, align = self._refs, self._call.align
        rows, visit = rows_at(start, size, align), Visit(column, 0, 0)
        return Together(
            pltpu.make_async_copy(
                held.at[slot, rows_at(0, size, align)],
                ref.at[rows, self._columns(visit, width=out.columns(self._tiles))],
                refs.out_done_S.at[slot],
            )
            for out, held, ref in zip(self._plan.outs, refs.outs_held, refs.outs, strict=True)
        )


def kernel(sizes_G: Any, *references: Any, plan: Plan, call: Call, tiles: ProductTiles, cores: int) -> None:
    """See `tpu_rows`."""
    refs, core, align = _Refs(references, plan, call), pl.program_id(0), call.align
    total = write_ends(sizes_G, refs.ends_G, call.rows)
    first, last = _share(total, core, cores, align)
    walk = Walk(refs.ends_G, first, last, columns=tiles.passes(call.width), rows=tiles.rows, align=align)
    copies = _Copies(refs, walk, plan, call, tiles)

    def fetch(visit: Visit, slot: Any) -> tuple[Visit, Any]:
        """Starts the copies of a visit's rows, if there is such a visit."""
        pl.when(walk.more(visit))(lambda: copies.rows(visit, slot).start())
        return walk.after(visit), next_slot(slot, tiles.lhs_slots)

    held_rows = _gather(refs, call, tiles, first, last) if call.gathered else None
    zero_waits = [
        write_zeros(ref, zeros, refs.zero_done, total, core, cores, align)
        for ref, zeros in zip(refs.outs, refs.zeros, strict=True)
    ]
    outgoing = Outgoing(refs.out_sizes_S, copies.outs)
    visit, zero = walk.begin(), jnp.int32(0)
    pl.when(walk.more(visit))(lambda: copies.rhs(visit, 0).start())
    ahead: Any = ()
    if copies.any_rows:
        ahead = (visit, zero)
        for _ahead in range(tiles.lhs_slots - 1):
            ahead = fetch(*ahead)

    def step(carry: tuple) -> tuple:
        visit, ahead, is_new, rows_slot, rhs_slot, out_slot = carry
        ahead = fetch(*ahead) if copies.any_rows else ahead

        @pl.when(is_new)
        def _() -> None:
            copies.rhs(visit, rhs_slot).wait()
            following = walk.after_group(visit)
            pl.when(walk.more(following))(lambda: copies.rhs(following, 1 - rhs_slot).start())

        (start, size), end = walk.window(visit), walk.end(visit)
        if held_rows is not None:
            held_rows.hold(visit, end)
        copies.rows(visit, rows_slot).wait()
        outgoing.wait(out_slot)
        block = _Block(plan, tiles, refs, rows_slot, out_slot, held_rows, visit, start, call.dtype)
        _multiply(block, size, rhs_slot)
        written = size
        for held, shared in zip(refs.outs_held, refs.shared, strict=True):
            written = join(held.at[out_slot], shared, visit.row - start, end - start, end == last, align)
        outgoing.started(out_slot, written)
        pl.when(written > 0)(lambda: copies.outs(out_slot, written, start, visit.column).start())

        following = walk.after(visit)
        is_new = (following.group != visit.group) | (following.column != visit.column)
        return (
            following, ahead, is_new, next_slot(rows_slot, tiles.lhs_slots) if copies.any_rows else rows_slot,
            jnp.where(is_new, 1 - rhs_slot, rhs_slot), next_slot(out_slot, tiles.out_slots),
        )  # fmt: skip

    lax.while_loop(lambda carry: walk.more(carry[0]), step, (visit, ahead, jnp.bool_(True), zero, zero, zero))
    outgoing.drain()
    for wait in zero_waits:
        wait()


def _share(total: Any, core: Any, cores: int, align: int) -> tuple[Any, Any]:
    """The rows of a core: whole tiles, as many as of any other."""
    if cores == 1:
        return jnp.int32(0), total
    assert cores == 2
    middle = jnp.minimum(ceil_to(total >> 1, align), total)
    return jnp.where(core == 0, 0, middle), jnp.where(core == 0, middle, total)


def _gather(refs: _Refs, call: Call, tiles: ProductTiles, first: Any, last: Any) -> tpu_gather.HeldRows:
    """Of the pieces that hold rows [first, last), in every pass; begun."""
    shift = call.piece.bit_length() - 1
    piece, behind = (lax.shift_right_logical(row, shift) for row in (first, last + call.piece - 1))
    count = jnp.where(last > first, behind - piece, 0)
    passes = tiles.passes(call.width)
    gather = tpu_gather.Gather(refs.lhs[0], refs.index[0], piece, count, passes, refs.gather[:-1])
    gather.begin()
    return tpu_gather.HeldRows(gather, piece, count, refs.gather[-1])


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a visit works on, in VMEM."""

    plan: Plan
    tiles: ProductTiles
    refs: _Refs
    rows_slot: Any
    out_slot: Any
    held_rows: tpu_gather.HeldRows | None
    visit: Visit
    start: Any
    dtype: Any

    def place(self, row: Any) -> Any:
        """Where a row of the window stands among the gathered ones."""
        assert self.held_rows is not None
        return pl.multiple_of(self.held_rows.place(self.visit, self.start + row), self.refs.shared[0].shape[0])

    def compute(self, first: Any, lhs_first: Any, count: int, column: Any, rhs_slot: Any) -> None:
        """The outputs of `count` rows of the window and a block of columns."""
        refs, wide = self.refs, self.tiles.block_columns
        rows, columns = pl.ds(first, count), pl.ds(pl.multiple_of(column, wide), wide)
        numbers = (((1,), (1 if self.plan.transpose_rhs else 0,)), ((), ()))
        precision = lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT

        def product(lhs: int, held: int) -> jax.Array:
            matrix = refs.rhs_held[held].at[rhs_slot]
            if self.held_rows is None:
                left = refs.lhs_held[lhs][self.rows_slot, rows]
            else:
                left = self.held_rows.held_RD[pl.ds(lhs_first, count)]
            right = matrix[columns, :] if self.plan.transpose_rhs else matrix[:, columns]
            # Matrices of 8 bits are made wider here, each time: between the matrix instructions that costs next to nothing.
            result = lax.dot_general(
                left, right.astype(left.dtype), numbers, precision=precision, preferred_element_type=jnp.float32
            )
            return result * refs.scales_held[held][rhs_slot, :, columns] if refs.scales else result

        parts = [functools.reduce(jnp.add, (product(*pair) for pair in part)) for part in self.plan.parts]
        beside = [each[self.rows_slot, rows, columns] for each in refs.beside_held]
        of_rows = [each[self.rows_slot, rows] for each in refs.of_rows_held]
        for out, held, result in zip(
            self.plan.outs, refs.outs_held, self.plan.finish(parts, beside, of_rows), strict=True
        ):
            if not out.is_row_sum:
                held[self.out_slot, rows, columns] = result
            elif wide == self.tiles.columns:
                held[self.out_slot, rows] = result
            else:
                held[self.out_slot, rows] = result + jnp.where(column == 0, 0.0, held[self.out_slot, rows])


def _multiply(block: _Block, rows: Any, slot: Any) -> None:
    """The outputs of the first `rows` rows of a window, rounded up to a multiple of `step_rows`."""
    tiles, held_rows = block.tiles, block.held_rows
    wide, most = tiles.block_columns, tiles.block_rows
    pieces = tiles.columns // wide

    def piece(first: Any, count: int, slot: Any = slot, coming: tpu_gather.Coming | None = None) -> None:
        first = pl.multiple_of(first, most)
        lhs_first = None if held_rows is None else block.place(first)
        each = 0 if held_rows is None else held_rows.gather.piece // pieces

        def with_columns(number: Any) -> None:
            if coming is not None:  # rows of a piece to come, between the matrix instructions
                coming.start(number * each, each)
            block.compute(first, lhs_first, count, number * wide, slot)

        if coming is not None:
            coming.start(each * pieces, coming.piece - each * pieces)
        if pieces == 1:
            with_columns(0)
        else:
            pl.loop(0, pieces)(with_columns)
        if coming is not None:
            coming.done()

    def whole(number: Any) -> None:
        if held_rows is None:
            piece(number * most, most)
            return
        gather = held_rows.gather
        has_room = gather.has_room()

        def with_copies(static: int) -> None:
            piece(number * most, most, static, gather.next())

        for static in range(2):
            # The compiler mixes no copies with reads at an address it does not know: a piece of code for each slot.
            pl.when(has_room & (slot == static))(functools.partial(with_copies, static))
        pl.when(jnp.logical_not(has_room))(lambda: piece(number * most, most))

    step = tiles.step_rows
    # A remainder that needs as many steps as a block has is one more block.
    blocks = lax.shift_right_logical(rows + step - 1, most.bit_length() - 1)
    pl.loop(0, blocks)(whole)
    remainder = rows - blocks * most
    for count in range(step, most, step):
        pl.when((remainder > count - step) & (remainder <= count))(functools.partial(piece, blocks * most, count))
