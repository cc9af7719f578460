"""How much each neuron, head, KV group, channel and layer matters, from forward passes over calibration data.

Width scores follow Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2): the activations of a unit are
reduced over each sequence, then over all sequences; the default is sqrt(sum_b (mean_s |a|)^2).
Layers: block influence 1 - cos(h_in, h_out), averaged over tokens (ShortGPT, Men et al. 2024, arXiv 2403.03853).
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.aggregation import Aggregation, Moments, batch_sums
from kwaicoder_jax.transforms.scores import Scores

Batch = Mapping[str, Any]  # "inputs", "positions", "segment_ids": [B, T] int32; other entries are not read


def collect(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    batch: str = Aggregation.L2,
    sequence: str = Aggregation.MEAN,
    weight_aware: bool = False,
    runtime: models.Runtime | None = None,
) -> Scores:
    """Scores every unit of a dense model: one forward pass per batch, no backward pass.

    Args:
      params: of a dense model.
      config: the model.
      batches: dicts with "inputs", "positions", "segment_ids", each [B, T]; segment 0 is padding and does not count.
      batch: how scores of sequences become one score: "l2" (not divided by the count), "mean" or "var".
      sequence: how the activations of a sequence become its score: "mean" of |a|, "l2" or "var" of |a|.
      weight_aware: multiply a neuron's score by the norm of its row of the down projection.
      runtime: how to compute it.

    Raises:
      UserError: no batch, a batch without a field, an unknown aggregation, or a mixture.
    """
    return measure(params, config, batches, runtime=runtime).scores(batch, sequence, weight_aware)


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Everything one pass over the data tells; any aggregation can be read from it without a second pass."""

    config: models.ModelConfig
    moments: dict[str, Moments]  # "neurons", "heads", "attention_norm", "mlp_norm", "final_norm"
    energy: dict[str, np.ndarray]  # of each norm, summed over tokens
    influence_L: np.ndarray  # summed over tokens
    outgoing_LF: np.ndarray  # norm of each neuron's row of the down projection
    outgoing_LH: np.ndarray  # Frobenius norm of each head's output matrix
    tokens: int
    sequences: int

    def scores(
        self, batch: str = Aggregation.L2, sequence: str = Aggregation.MEAN, weight_aware: bool = False
    ) -> Scores:
        """Reduces to Scores; see `collect` for the arguments."""
        reduced = {name: m.reduce(batch, sequence, self.sequences) for name, m in self.moments.items()}
        heads_LH, shape = reduced["heads"], (self.config.layers, self.config.kv_heads, -1)
        weighted_LKG = (heads_LH * self.outgoing_LH).reshape(shape)
        return Scores(
            neurons_LF=reduced["neurons"] * self.outgoing_LF if weight_aware else reduced["neurons"],
            heads_LH=heads_LH,
            groups_LK=np.sqrt(np.sum(np.square(weighted_LKG), axis=-1)),
            channels_D=np.sum(reduced["attention_norm"] + reduced["mlp_norm"], axis=0) + reduced["final_norm"],
            layers_L=self.influence_L / self.tokens,
            attention_norm_LD=self.energy["attention_norm"] / self.tokens,
            mlp_norm_LD=self.energy["mlp_norm"] / self.tokens,
            final_norm_D=self.energy["final_norm"] / self.tokens,
            tokens=self.tokens,
            sequences=self.sequences,
            aggregation={"batch": str(batch), "sequence": str(sequence), "weight_aware": weight_aware},
        )


def measure(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    runtime: models.Runtime | None = None,
) -> Measurements:
    """The pass behind `collect`; call it directly to compare aggregations. Arguments and errors as there."""
    if config.experts is not None:
        raise UserError("scores are of dense models", where="model.experts", remedy="collect them before upcycling")
    models.check(params, config)
    total: Any = None
    for number, one in enumerate(batches):
        tokens = _tokens(one, number)
        sums = jax.tree.map(_host, _sums(params, config, runtime or models.Runtime(), *tokens))
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None or total["tokens"] == 0:
        raise UserError("no tokens to measure on", where="batches", remedy="give at least one batch with a token")
    return Measurements(
        config=config,
        moments={name: Moments(*pair) for name, pair in total["moments"].items()},
        energy=total["energy"],
        influence_L=total["influence"],
        outgoing_LF=_host(_outgoing_norms(params, config, "mlp")),
        outgoing_LH=_host(_outgoing_norms(params, config, "heads")),
        tokens=int(total["tokens"]),
        sequences=int(total["sequences"]),
    )


def _tokens(batch: Batch, number: int) -> tuple[Any, Any, Any]:
    for name in ("inputs", "positions", "segment_ids"):
        if name not in batch:
            raise UserError(f"batch {number} has no {name!r}", where="batches", remedy=f"it has {sorted(batch)}")
    return batch["inputs"], batch["positions"], batch["segment_ids"]


@functools.partial(jax.jit, static_argnames=("config", "runtime"))
def _sums(params: models.Params, config, runtime, inputs_BT, positions_BT, segments_BT) -> dict[str, Any]:
    """One batch's sums over sequences and over tokens, float32; no activation leaves the device."""
    output = models.forward(params, config, inputs_BT, positions_BT, segments_BT, runtime=runtime, statistics=True)
    layers, final = output.statistics["layers"], output.statistics["final_norm"]
    count_B = jnp.sum(segments_BT > 0, axis=1).astype(jnp.float32)
    tokens = jnp.sum(count_B)
    influence_LB = layers["influence"]["mean"][:, :, 0]
    norms = {"attention_norm": layers["attention_norm"], "mlp_norm": layers["mlp_norm"], "final_norm": final}
    units = {name: norm["channels"] for name, norm in norms.items()}
    units |= {"neurons": layers["mlp"]["neurons"], "heads": layers["attention"]["heads"]}
    return {
        "moments": {name: batch_sums(statistics) for name, statistics in units.items()},
        "energy": {name: norm["energy"] * tokens for name, norm in norms.items()},
        "influence": influence_LB @ count_B,
        "tokens": tokens,
        "sequences": jnp.sum(count_B > 0),
    }


@functools.partial(jax.jit, static_argnames=("config", "axis"))
def _outgoing_norms(params: models.Params, config: models.ModelConfig, axis: str) -> jax.Array:
    """[L, units]: norm of what each unit along `axis` writes to the channels with; one parameter does that."""
    flat = models.flatten(params)
    (name,) = (n for n, d in models.declarations(config).items() if axis in d.axes and d.axes[-1] == "embed")
    axes = models.declarations(config)[name].axes
    summed = tuple(place for place, other in enumerate(axes) if other not in ("layers", axis))
    return jnp.sqrt(jnp.sum(jnp.square(flat[name].astype(jnp.float32)), axis=summed))


def _host(array: jax.Array) -> np.ndarray:
    """As float64 on this host, also where the array is spread over processes."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, dtype=np.float64)
