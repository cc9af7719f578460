"""First rows of the router: one per replica, which its G experts share, so that top-k takes whole replicas.

Rows are made by numpy, so that every back end, mesh and jit boundary sees the same router, and only change which replica
a token takes, never the function.
"""

import enum
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.activations import observe
from kwaicoder_jax.transforms.arrays import host
from kwaicoder_jax.transforms.batches import Batch, entries
from kwaicoder_jax.transforms.clustering import centroids


class RouterInit(enum.StrEnum):
    """Where the rows come from."""

    NORMAL = "normal"  # independent entries N(0, std)
    ZEROS = "zeros"  # all replicas tie; the first k take every token until training tells them apart
    ORTHOGONAL = "orthogonal"  # random, at right angles, of length std * sqrt(D); needs R <= D
    CENTROIDS = "centroids"  # k-means of the layer's own inputs, of length std * sqrt(D); needs `mlp_inputs`


def parse(method: str, config: models.ModelConfig, replicas: int, inputs_LMD: np.ndarray | None) -> RouterInit:
    """The method, checked against what it needs."""
    try:
        chosen = RouterInit(method)
    except ValueError as error:
        choices = ", ".join(RouterInit)
        raise UserError(f"no such start {method!r}", where="upcycle.router_init", remedy=f"use {choices}") from error
    if chosen is RouterInit.ORTHOGONAL and replicas > config.model_dim:
        raise UserError(
            f"{replicas} rows of {config.model_dim} channels cannot be orthogonal", where="upcycle.router_init",
            remedy="use normal",
        )  # fmt: skip
    if chosen is RouterInit.CENTROIDS:
        if inputs_LMD is None:
            raise UserError(
                "centroids are of the MLPs' inputs", where="upcycle.router_init",
                remedy="pass what router_init.mlp_inputs returns, or use normal",
            )  # fmt: skip
        if inputs_LMD.shape[::2] != (config.layers, config.model_dim) or inputs_LMD.shape[1] < replicas:
            raise UserError(
                f"inputs of shape {inputs_LMD.shape}", where="upcycle.router_init",
                remedy=f"give [{config.layers}, {replicas} or more, {config.model_dim}]",
            )  # fmt: skip
    return chosen


def columns(
    method: str, shape: tuple[int, ...], axes: tuple[str, ...], *, granularity: int, std: float, seed: int,
    rows_LRD: np.ndarray | None = None, layers: slice = slice(None),
) -> np.ndarray:  # fmt: skip
    """The router parameter, float32: every replica's row copied to its G experts, which get the same bits.

    Args:
      method: a value of RouterInit.
      shape: of the declared parameter, with E = R*G along "experts".
      axes: its declared axes, ending in "experts".
      granularity: G.
      std: standard deviation of the entries, or length of a row over sqrt(D).
      seed: of the draw.
      rows_LRD: of these layers, from `centroid_rows`, for "centroids".
      layers: which layers to return.
    """
    place = axes.index("experts")
    drawn = (*shape[:place], shape[place] // granularity, *shape[place + 1 :])
    if method == RouterInit.ZEROS:
        rows = np.zeros(drawn, np.float32)[layers]
    elif method == RouterInit.CENTROIDS:
        assert rows_LRD is not None
        rows = np.swapaxes(np.asarray(rows_LRD, np.float32), 1, 2)
    else:
        rows = _normal(drawn, seed)[layers] * np.float32(std)
        if method == RouterInit.ORTHOGONAL:
            length = std * shape[axes.index("embed")] ** 0.5
            rows = (np.linalg.qr(rows.astype(np.float64))[0] * length).astype(np.float32)
    return np.repeat(rows, granularity, axis=place)


@functools.lru_cache(maxsize=1)
def _normal(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """All layers' normal rows; kept, since a streamed transform asks for one layer after the other."""
    rows = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    rows.flags.writeable = False
    return rows


def centroid_rows(inputs_LMD: np.ndarray, replicas: int, *, std: float, seed: int) -> np.ndarray:
    """Rows that send tokens of one cluster to one replica, float32 [L, R, D].

    k-means of the directions of the inputs, about their mean; what a row has along the mean is taken out, since the
    router has no bias to make up for it, and all rows get the length std * sqrt(D) of a random row.

    Args:
      inputs_LMD: from `mlp_inputs`.
      replicas: R.
      std: see `columns`.
      seed: of the clustering.
    """
    rows = []
    for inputs_MD in np.asarray(inputs_LMD, np.float64):
        direction_MD = inputs_MD / np.maximum(np.linalg.norm(inputs_MD, axis=1, keepdims=True), 1e-12)
        mean_D = direction_MD.mean(axis=0)
        centre_RD = centroids(direction_MD - mean_D, replicas, seed=seed)
        along_D = mean_D / max(float(np.linalg.norm(mean_D)), 1e-12)
        row_RD = centre_RD - np.outer(centre_RD @ along_D, along_D)
        norm_R1 = np.maximum(np.linalg.norm(row_RD, axis=1, keepdims=True), 1e-12)
        rows.append(row_RD / norm_R1 * (std * inputs_MD.shape[1] ** 0.5))
    return np.stack(rows).astype(np.float32)


def mlp_inputs(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    tokens_per_batch: int = 512,
    seed: int = 0,
    runtime: models.Runtime | None = None,
) -> np.ndarray:
    """Normed inputs of every layer's MLP at random unpadded tokens, float32 [L, M, D].

    Memory: L * M * D float32 on the host; 8 batches of a 32-layer model of 4096 channels make 2 GB.

    Args:
      params: of a dense model.
      config: the model.
      batches: dicts with "inputs", "positions", "segment_ids", each [B, T]; segment 0 is padding.
      tokens_per_batch: at most; the same tokens in every layer.
      seed: of the choice.
      runtime: how to compute it.
    """
    found = []
    for number, batch in enumerate(batches):
        tokens = entries(batch, number)
        real_M = np.flatnonzero(host(tokens[2]).reshape(-1) > 0)
        generator = np.random.default_rng((seed, number))
        picked_M = np.sort(generator.choice(real_M, min(tokens_per_batch, len(real_M)), replace=False))
        if len(picked_M):
            found.append(host(_inputs(params, tokens, picked_M, config, runtime or models.Runtime())))
    if not found:
        raise UserError("no tokens to measure on", where="batches", remedy="give at least one batch with a token")
    return np.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "runtime"))
def _inputs(params, tokens, picked_M, config, runtime) -> jax.Array:
    def reduce(x_BTD: jax.Array, _: object, mask_BT: jax.Array) -> jax.Array:
        return jnp.take(x_BTD.reshape(-1, x_BTD.shape[-1]), picked_M, axis=0).astype(jnp.float32)

    return observe(params, config, tokens, reduce, runtime=runtime)[1]
