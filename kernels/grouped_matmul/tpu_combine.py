"""Rows in expert order back to their tokens on TPU: out[m] = sum over x of weight[m, x] * rows[index[m, x]], in float32.

Each row is read once, by a copy of its own, and nothing is written but the sums.

    tokens of a block    0 1 2 ... T-1
    rows of a piece      choice 0 of all of them | choice 1 | ... : a sum of X slabs [T, words], no row is moved
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import tpu_gather
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, vmem_limit

NAME = "sum_of_rows"
_ROWS = 256  # of a piece, about
_TOKENS = 16  # of a block, at least: a sublane tile of bfloat16


def sum_rows(
    rows_R1W: jax.Array, index_MX: jax.Array, weight_MX: jax.Array | None, dtype: Any, *, here: Chip,
    rows_of_a_piece: int = _ROWS, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """[M, D] in `dtype`: what `routing.api.weighted_sum` makes of the rows.

    Args:
      rows_R1W: `tpu_gather.packed` rows of `dtype`.
      index_MX: the row of each choice, in bounds.
      weight_MX: float32; ones if None.
      dtype: of the rows and of the result.
      here: the chip.
      rows_of_a_piece: about.
      interpret: as in `tpu.product`.
    """
    (tokens, choices), words = index_MX.shape, rows_R1W.shape[2]
    width = words * 4 // jnp.dtype(dtype).itemsize
    block = max(_TOKENS, rows_of_a_piece // choices // _TOKENS * _TOKENS)
    missing = -tokens % (block * here.cores)
    index_MX = jnp.pad(index_MX, ((0, missing), (0, 0)))
    index_QP = index_MX.reshape(-1, block, choices).swapaxes(1, 2).reshape(-1, choices * block)
    weights = [] if weight_MX is None else [jnp.pad(weight_MX, ((0, missing), (0, 0)))]
    steps = index_QP.shape[0] // here.cores
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def place(core: Any, step: Any) -> tuple[Any, int]:
        return core * steps + step, 0

    itemsize = jnp.dtype(dtype).itemsize
    out_MD = pl.pallas_call(
        functools.partial(_kernel, choices=choices, steps=steps, dtype=dtype),
        out_shape=jax.ShapeDtypeStruct((tokens + missing, width), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(here.cores, steps),
            in_specs=[anywhere, anywhere, *(pl.BlockSpec((block, choices), place) for _ in weights)],
            out_specs=pl.BlockSpec((block, width), place),
            scratch_shapes=tpu_gather.scratch_shapes(choices * block, words, dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_limit(here), disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * choices * width,
            bytes_accessed=itemsize * tokens * (choices + 1) * width + 4 * tokens * (choices + LANES),
            transcendentals=0,
        ),
        interpret=interpret,
        name=NAME,
    )(rows_R1W, index_QP, *weights)
    return out_MD[:tokens]


def _kernel(rows_R1W: Any, index_QP: Any, *refs: Any, choices: int, steps: int, dtype: Any) -> None:
    weights, out_TD, scratch = refs[:-6], refs[-6], refs[-5:]
    core, step = pl.program_id(0), pl.program_id(1)
    gather = tpu_gather.Gather(rows_R1W, index_QP, core * steps, jnp.int32(steps), 1, scratch)
    pl.when(step == 0)(gather.begin)
    pl.when(gather.has_room())(gather.start)
    rows_PW, tokens = gather.take(), out_TD.shape[0]

    @pl.loop(0, tokens, step=_TOKENS)
    def _(first: Any) -> None:
        here = pl.ds(pl.multiple_of(first, _TOKENS), _TOKENS)
        totals: list[jax.Array] = []
        for choice in range(choices):
            words = rows_PW[pl.ds(pl.multiple_of(choice * tokens + first, _TOKENS), _TOKENS)]
            parts = tpu_gather.unpack(words, dtype)
            if weights:
                parts = [part * weights[0][here, pl.ds(choice, 1)] for part in parts]
            totals = [total + part for total, part in zip(totals, parts, strict=True)] if totals else parts
        wide = totals[0].shape[1]
        for number, total in enumerate(totals):
            out_TD[here, pl.ds(number * wide, wide)] = total.astype(dtype)

    gather.release()
