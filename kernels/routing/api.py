"""Choosing experts, and sorting tokens by expert.

Dimension letters: M tokens, X experts per token, R = M * X rows, E experts.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.routing import reference, tpu, xla
from kernels.routing.moves import Routing, combine, permute, take_rows, weighted_sum

__all__ = [
    "ORDER", "PLATFORMS", "Backend", "Routing", "combine", "permute", "sort_by_expert", "take_experts", "take_rows",
    "top_experts", "weighted_sum",
]  # fmt: skip

ORDER = "order"  # name of a Routing, for `jax.checkpoint` policies


class Backend(enum.StrEnum):
    """Which implementation chooses and sorts; the results are the same to the bit."""

    AUTO = "auto"  # the best one for the platform that the computation is compiled for
    TPU = "tpu"  # our Pallas kernels; up to 1024 experts and 32 choices
    XLA = "xla"  # jax.lax.top_k, a sort, gathers and scatters; compiles everywhere, fast on CPU
    REFERENCE = "reference"  # stable sorts and one-hot masks, to be read


#: Back ends that run on one platform alone, as jax names it, and compile on no other.
PLATFORMS = {Backend.TPU: "tpu"}


def top_experts(
    scores_ME: jax.Array, choices: int, *, backend: Backend | str = Backend.AUTO
) -> tuple[jax.Array, jax.Array]:
    """The X experts with the highest scores, the best first, among equals the one with the lowest index.

    On every back end in the total order of IEEE 754, as in `jax.lax.top_k`: -0 is below +0, a NaN above infinity or, with
    its sign set, below minus infinity. Every token is given X different experts, whatever its scores are.

    Args:
      scores_ME: float32; the result is differentiable in them.
      choices: X, at most E.
      backend: a Backend or its value.

    Returns:
      Scores and experts (int32), [M, X].

    Raises:
      ValueError: another shape or dtype, more choices than experts, or a back end that cannot do so many.
    """
    if scores_ME.ndim != 2 or scores_ME.dtype != jnp.float32 or not 1 <= choices <= scores_ME.shape[1]:
        what = f"{scores_ME.dtype} {scores_ME.shape} and {choices} choices"
        raise ValueError(f"need float32 scores [M, E] and 1 to E choices; got {what}")
    return _top(Backend(backend), scores_ME.shape[1], choices, scores_ME)


def take_experts(x_ME: jax.Array, expert_MX: jax.Array, *, backend: Backend | str = Backend.AUTO) -> jax.Array:
    """What `x_ME` has for the experts of each token, [M, X]; differentiable in `x_ME`.

    Args:
      x_ME: any float dtype.
      expert_MX: different experts for each token, int32 in [0, E).
      backend: a Backend or its value.
    """
    return _take(Backend(backend), x_ME.shape[1], x_ME, expert_MX)


def sort_by_expert(experts_MX: jax.Array, num_experts: int, *, backend: Backend | str = Backend.AUTO) -> Routing:
    """Sorts the M * X (token, choice) pairs by expert, stably: within an expert, by token, then by choice.

    Args:
      experts_MX: expert of each pair, integers in [0, num_experts). The value num_experts is allowed too and means
        "none of these": such rows are sorted last and belong to no group (experts that live on another device).
      num_experts: E.
      backend: a Backend or its value.

    Raises:
      ValueError: a back end that cannot do so many.
    """

    def by(module: ModuleType) -> Callable[..., Any]:
        return functools.partial(module.sort_by_expert, experts=num_experts)

    sorted_ = _dispatch(Backend(backend), num_experts, experts_MX.shape[1], by, experts_MX.astype(jnp.int32))
    return jax.tree.map(lambda x: checkpoint_name(x, ORDER), Routing(*sorted_))


_BACKENDS = {Backend.TPU: tpu, Backend.XLA: xla, Backend.REFERENCE: reference}


def _dispatch(
    backend: Backend, experts: int, choices: int, function_of: Callable[[ModuleType], Callable[..., Any]],
    *operands: jax.Array,
) -> Any:  # fmt: skip
    if backend is not Backend.AUTO:
        return function_of(_BACKENDS[backend])(*operands)
    if not tpu.fits(experts, choices):
        return function_of(xla)(*operands)
    return jax.lax.platform_dependent(*operands, tpu=function_of(tpu), default=function_of(xla))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _top(backend: Backend, experts: int, choices: int, scores_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
    def by(module: ModuleType) -> Callable[..., Any]:
        return functools.partial(module.top_experts, choices=choices)

    return _dispatch(backend, experts, choices, by, scores_ME)


def _top_forward(backend: Backend, experts: int, choices: int, scores_ME: jax.Array) -> tuple[Any, jax.Array]:
    score_MX, expert_MX = _top(backend, experts, choices, scores_ME)
    return (score_MX, expert_MX), expert_MX


def _top_backward(
    backend: Backend, experts: int, choices: int, expert_MX: jax.Array, gradients: tuple[jax.Array, Any]
) -> tuple[jax.Array]:
    return (_spread(backend, experts, gradients[0], expert_MX),)


_top.defvjp(_top_forward, _top_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(backend: Backend, experts: int, x_ME: jax.Array, expert_MX: jax.Array) -> jax.Array:
    return _dispatch(backend, experts, expert_MX.shape[1], lambda module: module.take, x_ME, expert_MX)


def _take_forward(backend: Backend, experts: int, x_ME: jax.Array, expert_MX: jax.Array) -> tuple[Any, jax.Array]:
    return _take(backend, experts, x_ME, expert_MX), expert_MX


def _take_backward(
    backend: Backend, experts: int, expert_MX: jax.Array, gradient_MX: jax.Array
) -> tuple[jax.Array, None]:
    return _spread(backend, experts, gradient_MX, expert_MX), None


_take.defvjp(_take_forward, _take_backward)


def _spread(backend: Backend, experts: int, x_MX: jax.Array, expert_MX: jax.Array) -> jax.Array:
    """[M, E]: x_MX in the columns of its experts, zeros elsewhere."""

    def by(module: ModuleType) -> Callable[..., Any]:
        return functools.partial(module.spread, experts=experts)

    return _dispatch(backend, experts, expert_MX.shape[1], by, x_MX, expert_MX)
