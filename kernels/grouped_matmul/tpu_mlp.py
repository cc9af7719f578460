"""The expert MLP through fused kernels for TPU: rows in expert order are gathered by the products that read them.

    forward    x --gathered--> [gate, up, activation] --h--> down --packed rows--> sum of each token's rows
    backward   dy --gathered--> [down^T, and what follows of both projections] --dgate, dup--> [gate^T + up^T]
               --packed rows--> sum of each token's rows; drhs of gate and up from gathered x, of down from gathered dy

What XLA would write and read again stays in VMEM: the gathered rows, the activation's operands, the sum of two products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul import tpu, tpu_gather, tpu_tiles
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, gated
from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices
from kernels.grouped_matmul.tpu_combine import sum_rows
from kernels.grouped_matmul.tpu_plan import Out, Plan
from kernels.grouped_matmul.tpu_rows import grouped_rows
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, sublanes
from kernels.routing import Routing
from kernels.routing.api import take_rows

GATE_UP, DOWN, GRAD_IN, GRAD_X = "experts_gate_up", "experts_down", "experts_grad_in", "experts_grad_x"
KERNELS = (GATE_UP, DOWN, GRAD_IN, GRAD_X)


def fits(arguments: Arguments) -> bool:
    """Whether the kernels take it: bfloat16 or float32, widths of whole tiles, of packed rows too."""
    _, width, neurons = arguments.gate_EDF.shape
    dtype = arguments.x_MD.dtype
    kinds = {jnp.dtype(each.values_GKN.dtype) if isinstance(each, ScaledMatrices) else None for each in arguments[2:]}
    if dtype not in (jnp.bfloat16, jnp.float32) or not arguments.weight_MX.size or len(kinds) > 1:
        return False
    return neurons % LANES == 0 and width % (LANES * 4 // dtype.itemsize) == 0


def work(flops: float, nbytes: float, rows: int, groups: int, itemsize: int) -> tuple[float, float]:
    """What one of KERNELS executes at worst, from its own estimate: every group begins and ends inside a tile."""
    return flops * tpu.computed_rows(rows, groups, itemsize) / max(rows, 1), nbytes


def gate_up_plan(activation: Activation, dtype: Any, keep: bool) -> Plan:
    """h = activation(x gate) * (x up), and both projections with `keep`."""

    def finish(parts: Sequence[jax.Array], *_: Any) -> list[jax.Array]:
        gate, up = (part.astype(dtype) for part in parts)
        return [gated(activation, gate, up).astype(dtype), *((gate, up) if keep else ())]

    outs = (Out(dtype),) * (3 if keep else 1)
    return Plan(GATE_UP, ((0, 0), (1, 0)), (((0, 0),), ((0, 1),)), outs, finish)


def packed_plan(name: str, lhs: int, words: int, dtype: Any, transpose_rhs: bool) -> Plan:
    """The sum of as many products as there are `lhs`, as packed rows of `words`."""
    halves = 4 // jnp.dtype(dtype).itemsize
    held = tuple((matrix, half * words) for matrix in range(lhs) for half in range(halves))
    parts = tuple(tuple((matrix, matrix * halves + half) for matrix in range(lhs)) for half in range(halves))

    def finish(parts: Sequence[jax.Array], *_: Any) -> list[jax.Array]:
        return [tpu_gather.pack(list(parts), dtype)]

    outs = (Out(tpu_gather.words_dtype(dtype), is_packed=True),)
    return Plan(name, held, parts, outs, finish, transpose_rhs)


def grad_in_plan(activation: Activation, dtype: Any) -> Plan:
    """From dy down^T and both projections: their gradients, what down's gradient is made with, the weights' gradient."""

    def finish(
        parts: Sequence[jax.Array], beside: Sequence[jax.Array], of_rows: Sequence[jax.Array]
    ) -> list[jax.Array]:
        (dh,), (weight,) = parts, of_rows
        h, pull = jax.vjp(functools.partial(gated, activation), *beside)
        weight = jnp.concatenate([weight] * (dh.shape[1] // LANES), axis=1)
        dgate, dup = pull(dh * weight)
        products = dh * h
        sums = functools.reduce(jnp.add, jnp.split(products, dh.shape[1] // LANES, axis=1))
        return [dgate, dup, (h * weight).astype(dtype), sums]

    outs = (Out(dtype), Out(dtype), Out(dtype), Out(jnp.float32, is_row_sum=True))
    return Plan(GRAD_IN, ((0, 0),), (((0, 0),),), outs, finish, transpose_rhs=True)


def forward(
    activation: Activation, arguments: Arguments, routing: Routing, *, keep: bool, chip: Chip | None = None, **how: Any
) -> tuple[jax.Array, Saved | None]:
    """The layer's output [M, D], and both projections with `keep`."""
    x_MD, weight_MX, gate_EDF, up_EDF, down_EFD = arguments
    here, dtype, sizes_E = chip or tpu_tiles.chip(), x_MD.dtype, routing.group_sizes_E
    (_, width, neurons), pad = gate_EDF.shape, functools.partial(_with_rows, unit=sublanes(dtype))
    h_RF, *saved = grouped_rows(
        [tpu_gather.packed(x_MD)], [gate_EDF, up_EDF], sizes_E, gate_up_plan(activation, dtype, keep), width=neurons,
        dtype=dtype, index_M=pad(routing.token_R), here=here, **how,
    )  # fmt: skip
    y_R1W = _packed_rows(DOWN, [h_RF], [down_EFD], sizes_E, width, False, here, how)
    y_MD = sum_rows(y_R1W, routing.row_MX, weight_MX, dtype, here=here, interpret=how.get("interpret", False))
    if not keep:
        return y_MD, None
    # Behind a barrier: XLA would merge the kernel with what stacks these over layers, and forget how much VMEM it may have.
    return y_MD, Saved(*lax.optimization_barrier(tuple(each[: routing.slot_R.shape[0]] for each in saved)))


def backward(
    activation: Activation, arguments: Arguments, routing: Routing, saved: Saved, dy_MD: jax.Array, *,
    chip: Chip | None = None, **how: Any,
) -> Gradients:  # fmt: skip
    """Gradients of all arguments, which are not quantized."""
    x_MD, weight_MX, gate_EDF, up_EDF, down_EFD = arguments
    here, dtype, sizes_E = chip or tpu_tiles.chip(), x_MD.dtype, routing.group_sizes_E
    (_, width, neurons), pad = gate_EDF.shape, functools.partial(_with_rows, unit=sublanes(dtype))
    weight_RL = jnp.broadcast_to(take_rows(weight_MX.reshape(-1, 1), routing.slot_R), (routing.slot_R.size, LANES))
    dy_MD = dy_MD.astype(dtype)
    dgate_RF, dup_RF, hw_RF, dweight_RS = grouped_rows(
        [tpu_gather.packed(dy_MD)], [down_EFD], sizes_E, grad_in_plan(activation, dtype), width=neurons, here=here,
        index_M=pad(routing.token_R), beside=[pad(each) for each in saved], of_rows=[pad(weight_RL)], **how,
    )  # fmt: skip
    dx_R1W = _packed_rows(GRAD_X, [dgate_RF, dup_RF], [gate_EDF, up_EDF], sizes_E, width, True, here, how)
    interpret = how.get("interpret", False)
    x_RD, dy_RD = (take_rows(rows_MD, pad(routing.token_R)) for rows_MD in (x_MD, dy_MD))
    outer = functools.partial(tpu.outer, group_sizes_G=sizes_E, chip=here, interpret=interpret)
    return Gradients(
        x_MD=sum_rows(dx_R1W, routing.row_MX, None, dtype, here=here, interpret=interpret),
        weight_MX=take_rows(jnp.sum(dweight_RS, axis=1), routing.row_MX),
        gate_EDF=outer(x_RD, dgate_RF),
        up_EDF=outer(x_RD, dup_RF),
        down_EFD=outer(dy_RD, hw_RF).swapaxes(1, 2),  # D before F, see `composed_mlp`
    )


def _packed_rows(
    name: str, lhs: Sequence[jax.Array], rhs: Sequence[Matrices], sizes_E: jax.Array, width: int, transpose_rhs: bool,
    here: Chip, how: dict[str, Any],
) -> jax.Array:  # fmt: skip
    dtype = lhs[0].dtype
    words = width * dtype.itemsize // 4
    plan = packed_plan(name, len(lhs), words, dtype, transpose_rhs)
    return grouped_rows(lhs, rhs, sizes_E, plan, width=words, dtype=dtype, here=here, **how)[0]


def _with_rows(x: jax.Array, unit: int) -> jax.Array:
    """More rows, of no group, so that these are whole tiles."""
    missing = -x.shape[0] % unit
    return jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) if missing else x
