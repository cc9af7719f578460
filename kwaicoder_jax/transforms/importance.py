"""How much each neuron, head, KV group, channel, expert and layer matters, from forward passes over calibration data.

Width scores follow Minitron (Muralidharan et al. 2024, arXiv 2407.14679, section 2.2): the activations of a unit are
reduced over each sequence, then over all sequences; the default is sqrt(sum_b (mean_s |a|)^2).
Layers: block influence 1 - cos(h_in, h_out), averaged over tokens (ShortGPT, Men et al. 2024, arXiv 2403.03853), the
same for runs of layers (Gromov et al. 2024, arXiv 2403.17887), and the loss without a layer (`leave_one_out`).
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.aggregation import Aggregation, Moments
from kwaicoder_jax.transforms.batches import Batch, entries
from kwaicoder_jax.transforms.layer_importance import LeaveOneOut, block_influence, leave_one_out
from kwaicoder_jax.transforms.measurements import Measurements
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import check_one_stack

__all__ = ["Aggregation", "LeaveOneOut", "Measurements", "Scores", "collect", "leave_one_out", "measure"]


def collect(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    batch: str = Aggregation.L2,
    sequence: str = Aggregation.MEAN,
    weight_aware: bool = False,
    blocks: bool = False,
    runtime: models.Runtime | None = None,
) -> Scores:
    """Scores every unit of a model, dense or mixture: one forward pass per batch, no backward pass.

    Args:
      params: of the model; sharded over a mesh or not.
      config: the model.
      batches: dicts with "inputs", "positions", "segment_ids", each [B, T]; segment 0 is padding and does not count.
      batch: how scores of sequences become one score: "l2" (not divided by the count), "mean" or "var".
      sequence: how the activations of a sequence become its score: "mean" of |a|, "l2" or "var" of |a|.
      weight_aware: multiply a neuron's score by the norm of its row of the down projection.
      blocks: also the influence of every run of layers; keeps the residual stream of all layers, [L, B, T, D].
      runtime: how to compute it.

    Raises:
      UserError: no batch, a batch without a field, an unknown aggregation, parameters of another model.
    """
    Aggregation.parse(batch, "batch")
    inner = Aggregation.parse(sequence, "sequence")
    measured = measure(params, config, batches, sequence=inner, blocks=blocks, runtime=runtime)
    return measured.scores(batch, sequence, weight_aware)


def measure(
    params: models.Params,
    config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    sequence: str | None = None,
    blocks: bool = False,
    runtime: models.Runtime | None = None,
) -> Measurements:
    """The pass behind `collect`; call it directly to compare aggregations. Arguments and errors as there.

    `sequence` None keeps all three reductions inside a sequence, so that any aggregation can be read; one of them alone
    is cheaper, and the others cannot be read then.
    """
    models.check(params, config)
    check_one_stack(config)
    inner = None if sequence is None else Aggregation.parse(sequence, "sequence")
    options = {"config": config, "runtime": runtime or models.Runtime(), "sequence": inner, "blocks": blocks}
    total: Any = None
    running: Any = None  # the latest batch's sums, added up while the device works on the next one
    for number, one in enumerate(batches):
        sums = batch_sums(params, *entries(one, number), **options)
        total, running = _add(total, running), sums
    total = _add(total, running)
    if total is None or total["tokens"] == 0:
        raise UserError("no tokens to measure on", where="batches", remedy="give at least one batch with a token")
    return Measurements(
        config=config,
        moments={name: Moments(**pair) for name, pair in total["moments"].items()},
        energy=total["energy"],
        influence_L=total["influence"],
        outgoing={name: _host(norms) for name, norms in _outgoing_norms(params, config).items()},
        tokens=int(total["tokens"]),
        sequences=int(total["sequences"]),
        blocks_LL=total.get("blocks"),
        experts_LE=total.get("experts"),
    )


@functools.partial(jax.jit, static_argnames=("config", "runtime", "sequence", "blocks"))
def batch_sums(
    params: models.Params, inputs_BT, positions_BT, segments_BT, *, config, runtime, sequence=None, blocks=False
) -> dict[str, Any]:
    """One batch's sums over sequences and over tokens, float32; no activation leaves the device.

    With `sequence`, the other reductions are not returned, and XLA drops their computation, out of the scan too.
    """
    arguments = (params, config, inputs_BT, positions_BT, segments_BT)
    output = models.forward(*arguments, runtime=runtime, statistics=True, collect_layers=blocks)
    layers, final = output.statistics["layers"], output.statistics["final_norm"]
    norms = {"attention_norm": layers["attention_norm"], "mlp_norm": layers["mlp_norm"], "final_norm": final}
    units = {name: norm["channels"] for name, norm in norms.items()} | layers["attention"]
    result: dict[str, Any] = {
        "energy": {name: norm["energy"] for name, norm in norms.items()},
        "influence": layers["influence"],
        "tokens": jnp.sum(segments_BT > 0),
        "sequences": jnp.sum(jnp.any(segments_BT > 0, axis=1)),
    }
    if config.experts is None:
        units["neurons"] = layers["mlp"]["neurons"]
    else:
        units["expert_neurons"], result["experts"] = layers["moe"]["expert_neurons"], layers["moe"]["experts"]
    if config.experts is not None and config.experts.shared_mlp_dim:
        units["shared_neurons"] = layers["moe"]["shared"]["neurons"]
    if blocks and output.layers_LBTD is not None:
        result["blocks"] = block_influence(output.embedded_BTD, output.layers_LBTD, segments_BT > 0)
        result["influence"] = jnp.diagonal(result["blocks"])  # so that XLA drops the layers' own
    if sequence is not None:
        units = {
            name: {order: {sequence: sums[sequence]} for order, sums in pair.items()} for name, pair in units.items()
        }
    return {**result, "moments": units}


#: Logical axis of each kind of neuron.
_NEURONS = {"neurons": "mlp", "expert_neurons": "expert_mlp", "shared_neurons": "shared_mlp"}


@functools.partial(jax.jit, static_argnames="config")
def _outgoing_norms(params: models.Params, config: models.ModelConfig) -> dict[str, jax.Array]:
    """[L, ..., units] of each kind of neuron: the norm of what it writes to the channels with."""
    flat, found = models.flatten(params), {}
    for name, declaration in models.declarations(config).items():
        for kind, axis in _NEURONS.items():
            if declaration.axes[-2:] == (axis, "embed"):
                found[kind] = jnp.linalg.norm(flat[name].astype(jnp.float32), axis=-1)
    return found


def _add(total: Any, sums: Any) -> Any:
    """`total` + `sums` in float64 on this host; None is nothing."""
    if sums is None:
        return total
    here = jax.tree.map(_host, sums)
    return here if total is None else jax.tree.map(np.add, total, here)


def _host(array: jax.Array) -> np.ndarray:
    """As float64 on this host, also where the array is spread over processes."""
    if not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, dtype=np.float64)
