"""Which neurons fire on the same tokens, for shards of neurons that belong together.

A neuron fires on a token if it is among the `share` of the layer's neurons with the largest |activation| there; SwiGLU
has no zeros to go by (CMoE, Pei et al. 2025, arXiv 2502.04416, section 4.1). Two neurons are alike if their firing is
correlated over tokens (MoEfication, Zhang et al. 2022, arXiv 2110.01786, section 3.1, for ReLU).
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.layers import plus, project
from kwaicoder_jax.transforms.activations import observe
from kwaicoder_jax.transforms.arrays import host
from kwaicoder_jax.transforms.batches import Batch, entries


@dataclasses.dataclass(frozen=True)
class CoActivation:
    """Firing statistics of a dense model; numpy float32, exact counts up to 2^24 tokens.

    Attributes:
      joint_LFF: tokens on which both neurons fire; None with a sketch.
      sketch_LFS: sum over tokens of firing times S random signs of the token, whose inner products estimate the joint
        counts with a standard deviation of about sqrt(fires_i * fires_j / S); None without a sketch.
      signs_S: sum over tokens of these signs.
      fires_LF: tokens on which a neuron fires.
      tokens: unpadded tokens seen.
    """

    joint_LFF: np.ndarray | None
    sketch_LFS: np.ndarray | None
    signs_S: np.ndarray | None
    fires_LF: np.ndarray
    tokens: int

    @property
    def layers(self) -> int:
        """L."""
        return len(self.fires_LF)

    def profiles(self, layer: int, neurons: np.ndarray | None = None) -> np.ndarray:
        """One row per neuron (of `neurons`, if given), rows of neurons that fire together being alike: [F, F or S].

        Rows of the correlation matrix, or sketches of the centred firing whose cosines estimate correlations.
        """
        here = np.arange(self.fires_LF.shape[1]) if neurons is None else neurons
        rate_F = self.fires_LF[layer][here].astype(np.float64) / self.tokens
        if self.joint_LFF is None:
            assert self.sketch_LFS is not None
            assert self.signs_S is not None
            centred_FS = self.sketch_LFS[layer][here] - np.outer(rate_F, self.signs_S)
            return centred_FS / np.maximum(np.linalg.norm(centred_FS, axis=1, keepdims=True), 1e-12)
        covariance_FF = self.joint_LFF[layer][np.ix_(here, here)] / self.tokens - np.outer(rate_F, rate_F)
        deviation_F = np.sqrt(np.maximum(rate_F * (1 - rate_F), 1e-12))
        return covariance_FF / np.outer(deviation_F, deviation_F)


def collect(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    share: float = 0.1,
    sketch: int = 0,
    seed: int = 0,
    runtime: models.Runtime | None = None,
) -> CoActivation:
    """Counts joint firing over `batches`: one forward pass each.

    Memory: L * F * F float32 on host and device; at F = 14336 that is 0.8 GB a layer. With a sketch L * F * S: 15 MB a
    layer at S = 256.

    Args:
      params: of a dense model.
      config: the model.
      batches: dicts with "inputs", "positions", "segment_ids", each [B, T]; segment 0 is padding and does not count.
      share: of a layer's neurons that fire on a token, in (0, 1).
      sketch: S, or 0 for exact counts.
      seed: of the random signs.
      runtime: how to compute it.

    Raises:
      UserError: no tokens, a share out of range, or a mixture.
    """
    if config.experts is not None:
        raise UserError("co-activation is of dense models", where="model.experts", remedy="collect it before upcycling")
    if not 0 < share < 1 or sketch < 0:
        raise UserError(f"share {share}, sketch {sketch}", where="coactivation", remedy="0 < share < 1, sketch >= 0")
    models.check(params, config)
    fire, total = max(1, round(share * config.mlp_dim)), None
    for number, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), number)
        one = _sums(params, entries(batch, number), key, config, runtime or models.Runtime(), fire, sketch)
        one = jax.tree.map(host, one)
        total = one if total is None else jax.tree.map(np.add, total, one)
    if total is None or total["tokens"] == 0:
        raise UserError("no tokens to measure on", where="batches", remedy="give at least one batch with a token")
    return CoActivation(
        joint_LFF=None if sketch else total["joint"],
        sketch_LFS=total["joint"] if sketch else None,
        signs_S=total["signs"] if sketch else None,
        fires_LF=total["fires"],
        tokens=int(total["tokens"]),
    )


@functools.partial(jax.jit, static_argnames=("config", "runtime", "fire", "sketch"))
def _sums(params, tokens, key, config, runtime, fire, sketch) -> dict[str, Any]:
    """One batch's counts, float32."""
    mask_M = (tokens[2] > 0).reshape(-1).astype(jnp.float32)
    signs_MS = jax.random.rademacher(key, (mask_M.size, sketch), jnp.float32) * mask_M[:, None]

    def reduce(x_BTD: jax.Array, p: Any, mask_BT: jax.Array) -> dict[str, jax.Array]:
        gate_BTF, up_BTF = (plus(project(x_BTD, p[name]), p.get(f"{name}_bias")) for name in ("gate", "up"))
        neurons_BTF = jax.nn.silu(gate_BTF) * up_BTF
        size_MF = jnp.abs(neurons_BTF.reshape(-1, neurons_BTF.shape[-1]).astype(jnp.float32))
        least_M1 = jax.lax.top_k(size_MF, fire)[0][:, -1:]
        fires_MF = (size_MF >= least_M1).astype(jnp.float32) * mask_BT.reshape(-1, 1).astype(jnp.float32)
        partner = signs_MS if sketch else fires_MF
        joint = jnp.einsum("MF,MS->FS", fires_MF, partner, precision=jax.lax.Precision.HIGHEST)
        return {"joint": joint, "fires": jnp.sum(fires_MF, axis=0)}

    _, seen = observe(params, config, tokens, reduce, runtime=runtime)
    return seen | {"signs": jnp.sum(signs_MS, axis=0), "tokens": jnp.sum(mask_M)}
