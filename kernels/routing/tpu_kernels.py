"""The two Pallas kernels of routing on TPU; docs/routing.md explains them, with a picture of the tiles.

Both take BLOCK tokens at a time, which fill one vector register of 8 x 128 for every expert or choice, so that nothing is
ever reduced within a register. Arrays are seen as they lie in memory, tiles of 8 experts (or choices) by 128 tokens one
after the other (`tiled`): no copy stands around the kernels, and tokens of one expert are read with a stride. No block
depends on another one, so the cores of a chip share them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TOP, PLACES = "routing_top", "routing_places"  # names of the kernels
LANES, SUBLANES = 128, 8
BLOCK = LANES * SUBLANES  # tokens

_SHIFT = 2.0**23  # 2^23 + n, as a float32, has n in its last bits, for n < 2^23,
SHIFT_BITS = 0x4B000000  # and before them these


def tiled(x_NM: jax.Array) -> jax.Array:
    """[N, M] as it lies in memory, [N / 8, M / 128 * 8, 128]; N and M are multiples of 8 and 128."""
    count, tokens = x_NM.shape
    tiles = x_NM.reshape(count // SUBLANES, SUBLANES, tokens // LANES, LANES).swapaxes(1, 2)
    return tiles.reshape(count // SUBLANES, tokens // LANES * SUBLANES, LANES)


def untiled(x: jax.Array) -> jax.Array:
    """The inverse of `tiled`."""
    tiles = x.reshape(x.shape[0], -1, SUBLANES, LANES).swapaxes(1, 2)
    return tiles.reshape(x.shape[0] * SUBLANES, -1)


def top(scores: jax.Array, experts: int, choices: int, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """The best `choices` of the first `experts` rows of tiled scores: scores and experts, tiled; see `api.top_experts`."""
    height, tokens = -(-choices // SUBLANES), scores.shape[1] // SUBLANES * LANES
    return pl.pallas_call(
        functools.partial(_top_kernel, experts=experts, choices=choices),
        out_shape=tuple(
            jax.ShapeDtypeStruct((height, *scores.shape[1:]), dtype) for dtype in (scores.dtype, jnp.int32)
        ),
        grid=(pl.cdiv(tokens, BLOCK),),
        in_specs=[_spec(scores.shape[0])],
        out_specs=(_spec(height), _spec(height)),
        compiler_params=_PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * SUBLANES * tokens * (scores.shape[0] + 2 * height)
        ),
        interpret=interpret,
        name=TOP,
    )(scores)  # fmt: skip


def places(experts: jax.Array, base_CG: jax.Array, choices: int, interpret: Any = False) -> jax.Array:
    """The sorted row of each pair, int32, tiled as the experts are.

    Args:
      experts: of each choice, tiled; none but the first `choices` rows are looked at.
      base_CG: rows before the first one that each 128 tokens have of each expert, minus SHIFT_BITS; G is a multiple of 8.
      choices: X, at most 256.
      interpret: see `tpu`.
    """
    groups, blocks = base_CG.shape[1], pl.cdiv(base_CG.shape[0], SUBLANES)
    return pl.pallas_call(
        functools.partial(_places_kernel, choices=choices),
        out_shape=jax.ShapeDtypeStruct(experts.shape, jnp.int32),
        grid=(blocks,),
        in_specs=[_spec(experts.shape[0]), pl.BlockSpec((SUBLANES, groups), lambda block: (block, 0))],
        out_specs=_spec(experts.shape[0]),
        scratch_shapes=[pltpu.VMEM((groups * SUBLANES, LANES), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)],
        compiler_params=_PARAMETERS,
        cost_estimate=pl.CostEstimate(
            flops=2 * blocks * groups * SUBLANES * LANES**2, transcendentals=0,
            bytes_accessed=4 * (2 * experts.size + base_CG.size),
        ),
        interpret=interpret,
        name=PLACES,
    )(experts, base_CG)  # fmt: skip


_PARAMETERS = pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=48 * 2**20)


def _spec(height: int) -> pl.BlockSpec:
    return pl.BlockSpec((height, SUBLANES * SUBLANES, LANES), lambda block: (0, block, 0))


def _row(group: Any, number: int) -> tuple[Any, ...]:
    """Where a tiled block has the tokens of row 8 * group + number."""
    return group, pl.ds(number, SUBLANES, stride=SUBLANES), slice(None)


def _ordered(bits: jax.Array) -> jax.Array:
    """Integers in the order of the floats that have these bits, and back: a negative float's other bits are flipped."""
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


_Best = list[tuple[jax.Array, jax.Array]]  # keys and experts, the best first


def _inserted(best: _Best, key: jax.Array, expert: Any, choices: int) -> _Best:
    """The best so far with one more expert, whose number is higher than theirs: it stands behind its equals."""
    new = (key, jnp.full(key.shape, expert, jnp.int32))
    above = [key > other for other, _ in best]
    made = []
    for place in range(min(len(best) + 1, choices)):
        here = new
        if place < len(best):
            here = _where(above[place], new, best[place])
        if place:  # where it went in further up
            here = _where(above[place - 1], best[place - 1], here)
        made.append(here)
    return made


def _where(which: jax.Array, yes: tuple[jax.Array, jax.Array], no: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
    return jnp.where(which, yes[0], no[0]), jnp.where(which, yes[1], no[1])


def _top_kernel(scores: Any, score_out: Any, expert_out: Any, *, experts: int, choices: int) -> None:
    def with_one_more(best: _Best, group: Any, number: int) -> _Best:
        key = _ordered(lax.bitcast_convert_type(scores[_row(group, number)], jnp.int32))
        return _inserted(best, key, group * SUBLANES + number, choices)

    def with_group(group: Any, best: _Best, count: int = SUBLANES) -> _Best:
        for number in range(count):
            best = with_one_more(best, group, number)
        return best

    whole, rest = divmod(experts, SUBLANES)
    filling = min(-(-choices // SUBLANES), whole)  # groups until the list is full
    best: _Best = []
    for group in range(filling):
        best = with_group(group, best)
    if whole > filling:
        best = lax.fori_loop(filling, whole, with_group, best)
    best = with_group(whole, best, rest)
    for choice, (key, expert) in enumerate(best):
        here = _row(*divmod(choice, SUBLANES))
        score_out[here] = lax.bitcast_convert_type(_ordered(key), jnp.float32)
        expert_out[here] = expert


def _places_kernel(
    experts: Any, base_CG: Any, row_out: Any, count: Any, before: Any, base: Any, *, choices: int
) -> None:
    chosen = [experts[_row(*divmod(choice, SUBLANES))] for choice in range(choices)]
    # A token's earlier choices of the same expert; the last one of them tells how many there are.
    earlier = [sum((jnp.where(mine == other, 1, 0) for other in chosen[:place]), jnp.zeros_like(mine))
               for place, mine in enumerate(chosen)]  # fmt: skip
    number = [(each + 1).astype(jnp.float32) for each in earlier]
    groups = base_CG.shape[1]
    for expert in range(groups):
        base[expert * SUBLANES : (expert + 1) * SUBLANES] = jnp.broadcast_to(
            base_CG[:, expert : expert + 1], (SUBLANES, LANES)
        )

    def of(expert: Any) -> Any:
        return pl.ds(pl.multiple_of(expert * SUBLANES, SUBLANES), SUBLANES)

    @pl.loop(0, groups // SUBLANES)
    def _(group: Any) -> None:
        for expert in (group * SUBLANES + each for each in range(SUBLANES)):
            tokens = jnp.zeros((SUBLANES, LANES), jnp.float32)
            for mine, many in zip(chosen, number, strict=True):
                tokens = jnp.where(mine == expert, many, tokens)
            count[of(expert)] = tokens

    # Products of small integers, exact in bfloat16 and in their float32 sums.
    is_before = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) < lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)
    before[...] = jnp.dot(count[...], is_before.astype(jnp.float32), preferred_element_type=jnp.float32)

    def place(group: Any, rows: list[jax.Array]) -> list[jax.Array]:
        for expert in (group * SUBLANES + each for each in range(SUBLANES)):
            first = lax.bitcast_convert_type(before[of(expert)] + _SHIFT, jnp.int32) + base[of(expert)]
            rows = [jnp.where(mine == expert, first, row) for mine, row in zip(chosen, rows, strict=True)]
        return rows

    rows = lax.fori_loop(0, groups // SUBLANES, place, [jnp.zeros_like(mine) for mine in chosen])
    for choice, (row, more) in enumerate(zip(rows, earlier, strict=True)):
        row_out[_row(*divmod(choice, SUBLANES))] = row + more
