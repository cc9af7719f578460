"""Drop-Upcycling: part of an expert's neurons drawn anew, so that replicas start out different.

Nakamura et al. 2025, arXiv 2502.19261, section 3.2: of each expert, a share r of the neurons is chosen once for all three
matrices, and each matrix's entries of them are drawn from a normal distribution with the mean and standard deviation of
the entries that they replace. Here replicas can be left out, so that some stay exact.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, host


def plan(ratio: float, replicas_dropped: int | Sequence[int] | None, *, replicas: int, width: int) -> dict[str, Any]:
    """The record's "drop": ratio, replicas (ascending) and neurons per expert; no replicas if nothing is dropped.

    Args:
      ratio: r in [0, 1], share of each expert's neurons.
      replicas_dropped: indices, or the number n of replicas of which the last n are dropped; None or empty for all.
      replicas: R.
      width: neurons of an expert.
    """
    if not 0 <= ratio <= 1:
        raise UserError(f"{ratio} is no share", where="upcycle.drop_ratio", remedy="use 0 to 1")
    if isinstance(replicas_dropped, int):
        if not 0 <= replicas_dropped <= replicas:
            raise UserError(
                f"{replicas_dropped} of {replicas} replicas",
                where="upcycle.drop_replicas",
                remedy=f"use 0 to {replicas}",
            )
        chosen = list(range(replicas - replicas_dropped, replicas))
    else:
        chosen = list(range(replicas))
        if replicas_dropped:
            if not all(isinstance(r, int) for r in replicas_dropped):
                what = f"{replicas_dropped!r} are no indices"
                raise UserError(what, where="upcycle.drop_replicas", remedy=f"use indices 0 to {replicas - 1}")
            chosen = sorted(set(replicas_dropped))
    if any(not 0 <= r < replicas for r in chosen):
        raise UserError(
            f"{chosen} of {replicas} replicas", where="upcycle.drop_replicas", remedy=f"use indices 0 to {replicas - 1}"
        )
    count = round(ratio * width)
    return {"ratio": ratio, "replicas": chosen if count else [], "neurons_per_expert": count if chosen else 0}


def redraw(
    array: Array, axes: tuple[str, ...], *, name: str, drop: dict[str, Any], granularity: int, seed: int, layer: int = 0
) -> Array:
    """`array` with the dropped neurons of each dropped replica drawn anew; float32 statistics by numpy, on the host.

    Depends on (seed, layer, expert, name) and the expert's own matrix alone.

    Args:
      array: an expert parameter [layers, E, ...], merged and scaled.
      axes: its declared axes.
      name: of the parameter.
      drop: from `plan`.
      granularity: G.
      seed: of choice and draw.
      layer: which layer the first one of `array` is.

    Raises:
      UserError: under `jax.jit`, where the weights have no values to take statistics of.
    """
    if not drop["replicas"]:
        return array
    if isinstance(array, jax.core.Tracer):
        raise UserError(
            "neurons cannot be dropped under jit", where="upcycle.drop_ratio", remedy="call upcycle outside of jax.jit"
        )
    place, on_host = axes.index("expert_mlp") - 2, isinstance(array, np.ndarray)
    mask = chosen(axes, array.shape, drop=drop, granularity=granularity, seed=seed, layer=layer)
    values = array.copy() if on_host else np.zeros(array.shape, array.dtype)
    for at, expert in np.argwhere(mask.any(axis=tuple(range(2, mask.ndim)))).tolist():
        here = np.flatnonzero(mask[at, expert])
        new = _draw(np.moveaxis(host(array[at, expert]), place, 0)[here], (seed, layer + at, expert), name)
        np.moveaxis(values[at, expert], place, 0)[here] = new
    return values if on_host else jnp.where(mask, jax.device_put(values, array.sharding), array)


def chosen(
    axes: tuple[str, ...], shape: tuple[int, ...], *, drop: dict[str, Any], granularity: int, seed: int, layer: int
) -> np.ndarray:
    """Which neurons are drawn anew: bool, of the rank of an expert parameter [layers, E, ...]; arguments as `redraw`."""
    width = shape[axes.index("expert_mlp")]
    mask_LEF = np.zeros((*shape[:2], width), bool)
    for at in range(shape[0]):
        for expert in (r * granularity + g for r in drop["replicas"] for g in range(granularity)):
            mask_LEF[at, expert, neurons(seed, layer + at, expert, width, drop["neurons_per_expert"])] = True
    return mask_LEF.reshape([n if axis in ("layers", "experts", "expert_mlp") else 1 for n, axis in zip(shape, axes)])


def neurons(seed: int, layer: int, expert: int, width: int, count: int) -> np.ndarray:
    """Which of an expert's `width` neurons are dropped, ascending: the same for all of its matrices."""
    return np.sort(np.random.default_rng((seed, layer, expert)).permutation(width)[:count])


def _draw(old: np.ndarray, key: tuple[int, int, int], name: str) -> np.ndarray:
    """Normal entries of the same mean and standard deviation, in the same dtype."""
    wide = np.ascontiguousarray(old, np.float64)  # one order of summation, whatever the order in memory was
    normal = np.random.default_rng((*key, zlib.crc32(name.encode()))).standard_normal(old.shape)
    return (wide.mean() + wide.std() * normal).astype(old.dtype)
