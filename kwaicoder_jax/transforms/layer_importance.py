"""Importance of layers beyond one at a time's influence: of runs of layers, and by the loss without a layer."""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.batches import TARGETS, Batch, entries


@dataclasses.dataclass(frozen=True)
class LeaveOneOut:
    """Held-out loss, in nats per token.

    Attributes:
      loss_L: without layer l.
      loss: of the whole model.
      tokens: how many targets counted.
    """

    loss_L: np.ndarray
    loss: float
    tokens: int

    @property
    def increase_L(self) -> np.ndarray:
        """What each layer's absence costs: `Scores.leave_one_out_L`."""
        return self.loss_L - self.loss


def leave_one_out(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    runtime: models.Runtime | None = None,
) -> LeaveOneOut:
    """The loss of the model with each layer left out in turn: L + 1 forward passes per batch, compiled once.

    A layer is left out by making it write zeros: what enters the residual stream is multiplied by a mask over layers,
    which is an argument of the one compiled function. This needs room for a second copy of those parameters.

    Args:
      params: of a dense model or a mixture.
      config: the model.
      batches: held-out dicts with "inputs", "positions", "segment_ids", "targets", "loss_mask", each [B, T].
      runtime: how to compute it.

    Raises:
      UserError: no target in any batch, a batch without a field, parameters of another model.
    """
    models.check(params, config)
    kept_NL = np.concatenate([1.0 - np.eye(config.layers), np.ones((1, config.layers))]).astype(np.float32)
    loss_N, count = np.zeros(config.layers + 1), 0.0
    for number, one in enumerate(batches):
        arrays = entries(one, number, TARGETS)
        sums = [
            _loss(params, kept_L, *arrays, config=config, runtime=runtime or models.Runtime()) for kept_L in kept_NL
        ]
        loss_N += np.array([float(loss) for loss, _ in sums])
        count += float(sums[-1][1])
    if count == 0:
        raise UserError("no targets to measure on", where="batches", remedy="give a batch with an unmasked target")
    return LeaveOneOut(loss_N[:-1] / count, float(loss_N[-1] / count), round(count))


@functools.partial(jax.jit, static_argnames=("config", "runtime"))
def _loss(
    params: models.Params, kept_L, inputs_BT, positions_BT, segments_BT, targets_BT, mask_BT, *, config, runtime
) -> tuple[jax.Array, jax.Array]:
    """Sum of the loss over the batch and the sum of its mask, of the layers where `kept_L` is 1."""
    masked = {}
    for name, array in models.flatten(params).items():
        d = models.declarations(config)[name]
        if d.writes:
            dense = config.dense_layers
            own_L = kept_L[:dense] if d.axes[0] == "dense_layers" else kept_L[dense:]
            array = array * own_L.reshape(-1, *(1 for _ in d.axes[1:])).astype(array.dtype)
        masked[name] = array
    output = models.forward(models.unflatten(masked), config, inputs_BT, positions_BT, segments_BT, runtime=runtime)
    mask_BT = mask_BT.astype(jnp.float32)
    return models.cross_entropy(output.hidden_BTD, models.projection(params), targets_BT, mask_BT), jnp.sum(mask_BT)


def block_influence(embedded_BTD: jax.Array, layers_LBTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Influence of every run of layers, summed over unmasked tokens (Gromov et al. 2024, arXiv 2403.17887).

    Args:
      embedded_BTD: the residual stream before the first layer.
      layers_LBTD: the residual stream after each layer.
      mask_BT: tokens that count.

    Returns:
      [L, L] float32: 1 - cos(before layer i, after layer j) at [i, j], zero where j < i.
    """
    time, points = mask_BT.shape[1], layers_LBTD.shape[0] + 1
    total_II, count_BT = jnp.zeros((points, points), jnp.float32), mask_BT.astype(jnp.float32)
    # Slices of time: a sharded batch stays sharded, no normalised copy of every state is made, and a product of two
    # matrices per slice is 7 times as fast on CPU as one per sequence. 1 - cos loses digits, hence HIGHEST, and a
    # difference for every slice.
    slices = np.array_split(np.arange(time), min(time, 8))
    for first, end in ((int(here[0]), int(here[-1]) + 1) for here in slices):
        stream_IBTD = jnp.concatenate([embedded_BTD[None, :, first:end], layers_LBTD[:, :, first:end]])
        stream_IBTD = stream_IBTD.astype(jnp.float32)
        norm_IBT1 = jnp.maximum(jnp.linalg.norm(stream_IBTD, axis=-1, keepdims=True), 1e-20)
        unit_IR = (stream_IBTD * (mask_BT[None, :, first:end, None] / norm_IBT1)).reshape(points, -1)
        cosines_II = jnp.matmul(unit_IR, unit_IR.T, precision=jax.lax.Precision.HIGHEST)
        total_II += jnp.sum(count_BT[:, first:end]) - cosines_II
    return jnp.triu(total_II[:-1, 1:])
