"""Merging shards into experts: R replicas of each of G shards, e = r*G + g, scaled, with one router row per replica.

The G shards of a replica share a router row, so top-k over experts takes whole replicas and their outputs add up to
the dense MLP. e = r*G + g (replica-major) is what keeps that true when two replicas tie: among equal logits the lowest
index wins, which finishes one replica before it starts the next.
"""

import enum
import functools
from typing import Any

import jax
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, namespace, scaled, take
from kwaicoder_jax.transforms.split import shards


class ScalePlacement(enum.StrEnum):
    """Which matrices carry the factor A; for SwiGLU the factors of up and down have to multiply to A."""

    BALANCED = "balanced"  # gate 1, up sqrt(A), down sqrt(A): exact to rounding
    DOWN = "down"  # (1, 1, A): exact to the bit for a power of two
    UP = "up"  # (1, A, 1): the same
    CUBE_ROOT = "cube_root"  # A^(1/3) on all three, as published; changes a SwiGLU's function


def scale(
    router: models.Router, *, granularity: int, replicas: int, experts_per_token: int, routed_scale: float
) -> float:
    """A, the factor on each expert's output that undoes the combine weights (He et al. 2024, 2410.07524, section 3.2).

    Args:
      router: how logits become combine weights.
      granularity: G.
      replicas: R.
      experts_per_token: T.
      routed_scale: what the sigmoid router multiplies its weights with.

    Returns:
      G where the weights sum to 1, G/routed_scale where they sum to that, and R*G*G/T for softmax without
      renormalisation, whose weights sum to T/(R*G) under a uniform router only.
    """
    if router is models.Router.SIGMOID:
        return granularity / routed_scale
    if router is models.Router.SOFTMAX_TOPK:
        return replicas * granularity * granularity / experts_per_token
    return float(granularity)


def placed(placement: str, factor: float) -> dict[str, float]:
    """The factor of each expert matrix: {"gate", "up", "down"}."""
    try:
        chosen = ScalePlacement(placement)
    except ValueError as error:
        choices = ", ".join(ScalePlacement)
        raise UserError(
            f"no placement {placement!r}", where="upcycle.scale_placement", remedy=f"use {choices}"
        ) from error
    if chosen is ScalePlacement.CUBE_ROOT:
        return dict.fromkeys(("gate", "up", "down"), factor ** (1 / 3))
    up = {ScalePlacement.BALANCED: factor**0.5, ScalePlacement.DOWN: 1.0, ScalePlacement.UP: factor}[chosen]
    down = {ScalePlacement.BALANCED: factor**0.5, ScalePlacement.DOWN: factor, ScalePlacement.UP: 1.0}[chosen]
    return {"gate": 1.0, "up": up, "down": down}


def experts(
    array: Array,
    axes: tuple[str, ...],
    target_axes: tuple[str, ...],
    *,
    granularity: int,
    replicas: int,
    order_RLF: np.ndarray | None = None,
    factor: float = 1.0,
) -> Array:
    """One dense MLP matrix as R*G expert matrices.

    Reshapes, one product, one transpose and one broadcast: the only full-size array is the result, and a mesh that
    shards the channels moves nothing.

    Args:
      array: with axes `axes`, which begin with "layers" and hold "mlp".
      axes: declared axes of the dense parameter.
      target_axes: declared axes of the expert parameter, with "experts" and "expert_mlp".
      granularity: G.
      replicas: R.
      order_RLF: from `partition.partition`; may name a part of the neurons only.
      factor: this matrix's share of A.
    """
    work = _experts if namespace(array) is np else _experts_on_device
    return work(array, order_RLF, axes, target_axes, granularity, replicas, factor)


def _experts(
    array: Array, order_RLF: Any, axes: tuple[str, ...], target_axes: tuple[str, ...], granularity: int, replicas: int,
    factor: float,
) -> Array:  # fmt: skip
    xp = namespace(array)
    array, names = shards(scaled(array, factor), axes, granularity, order_RLF)
    array = xp.broadcast_to(array, (array.shape[0], replicas, *array.shape[2:]))
    place = target_axes.index("experts")
    wanted = [*target_axes[:place], "replica", "shard", *target_axes[place + 1 :]]
    array = xp.transpose(array, [names.index(name) for name in wanted])
    return array.reshape(*array.shape[:place], replicas * granularity, *array.shape[place + 2 :])


_experts_on_device = functools.partial(
    jax.jit, static_argnames=("axes", "target_axes", "granularity", "replicas", "factor")
)(_experts)


def copies(array: Array, count: int, axis: int, factor: float) -> Array:
    """`count` equal experts along a new axis: a bias on the output, which knows no neurons, scaled."""
    xp = namespace(array)
    array = xp.expand_dims(scaled(array, factor), axis)
    return xp.broadcast_to(array, (*array.shape[:axis], count, *array.shape[axis + 1 :]))


def shared(array: Array, axes: tuple[str, ...], neurons_LS: np.ndarray, factor: float) -> Array:
    """The shared expert's matrix: the neurons of each layer of a matrix with axes `axes`, scaled."""
    return scaled(take(array, neurons_LS, axes.index("mlp"), axes=axes), factor)
