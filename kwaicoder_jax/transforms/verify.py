"""How far one model is from another on real tokens: logits, losses, KL, layers. Neither has to be a mixture."""

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import groups
from kwaicoder_jax.transforms.activations import observe
from kwaicoder_jax.transforms.report import Report

Batch = Mapping[str, Any]  # "inputs", "positions", "segment_ids", "targets", "loss_mask": [B, T]


def verify(
    dense_params: models.Params,
    dense_config: models.ModelConfig,
    moe_params: models.Params,
    moe_config: models.ModelConfig,
    batches: Iterable[Batch],
    *,
    runtime: models.Runtime | None = None,
    per_layer: bool = False,
    granularity: int | None = None,
    logit_elements: int = 1 << 24,
) -> Report:
    """Compares two models of one vocabulary over all `batches`.

    A float32 model is computed at full float32 precision, whatever the hardware's default is.

    Args:
      dense_params: of the reference.
      dense_config: the reference.
      moe_params: of the model that is compared with it.
      moe_config: that model.
      batches: dicts of "inputs", "positions", "segment_ids", "targets", "loss_mask", each [B, T].
      runtime: how to compute both.
      per_layer: also compare the residual stream after each layer; needs all of them in memory.
      granularity: G of the other model, if it is a mixture with virtual groups (the record's "granularity"): to count
        ties and broken groups.
      logit_elements: most elements of one model's logits that are live at once.

    Raises:
      UserError: no tokens, a batch without a field, or models of different vocabularies.
    """
    if dense_config.vocab_size != moe_config.vocab_size:
        raise UserError(f"{dense_config.vocab_size} and {moe_config.vocab_size} words", where="model.vocab_size")
    if per_layer and (dense_config.layers, dense_config.model_dim) != (moe_config.layers, moe_config.model_dim):
        raise UserError("the models have other layers", where="verify.per_layer", remedy="per_layer=False")
    total: dict[str, Any] | None = None
    exact = "float32" in (dense_config.dtype, moe_config.dtype)
    for number, batch in enumerate(batches):
        for name in ("inputs", "positions", "segment_ids", "targets", "loss_mask"):
            if name not in batch:
                raise UserError(f"batch {number} has no {name!r}", where="batches", remedy=f"it has {sorted(batch)}")
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            one = _compare(
                dense_params, moe_params, {name: batch[name] for name in _FIELDS},
                configs=(dense_config, moe_config), runtime=runtime or models.Runtime(), per_layer=per_layer,
                granularity=granularity if moe_config.experts else None, logit_elements=logit_elements,
            )  # fmt: skip
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), one)
        total = one if total is None else {name: _JOIN.get(name, np.add)(total[name], one[name]) for name in one}
    if total is None or total["tokens"] == 0:
        raise UserError("no tokens to compare on", where="batches", remedy="give a batch with an open loss mask")
    layers = np.sqrt(total["layer_error"] / total["layer_size"]).tolist() if per_layer else None
    return Report(
        max_relative_logit_error=float(total["max_error"] / total["max_logit"]),
        valid_loss_dense=float(total["loss_dense"] / total["tokens"]),
        valid_loss_moe=float(total["loss_moe"] / total["tokens"]),
        kl_dense_to_moe=float(total["kl"] / total["tokens"]),
        tokens=float(total["tokens"]),
        layer_relative_error_L=layers,
        load_LE=(total["load"] / total["seen"]).tolist() if "load" in total else None,
        border_ties_L=total["ties"].astype(int).tolist() if "ties" in total else None,
        broken_groups_L=total["broken"].astype(int).tolist() if "ties" in total else None,
    )


_FIELDS = ("inputs", "positions", "segment_ids", "targets", "loss_mask")
_JOIN = {"max_error": np.maximum, "max_logit": np.maximum}


@functools.partial(jax.jit, static_argnames=("configs", "runtime", "per_layer", "granularity", "logit_elements"))
def _compare(
    dense_params, moe_params, batch, *, configs, runtime, per_layer, granularity, logit_elements
) -> dict[str, jax.Array]:
    """One batch's sums and maxima, float32."""
    tokens = (batch["inputs"], batch["positions"], batch["segment_ids"])
    dense = models.forward(dense_params, configs[0], *tokens, runtime=runtime, collect_layers=per_layer)
    counts: dict[str, jax.Array] = {}
    if granularity is None:
        moe = models.forward(moe_params, configs[1], *tokens, runtime=runtime, collect_layers=per_layer)
    else:
        count = functools.partial(groups.count, experts=configs[1].experts, granularity=granularity)
        moe, counts = observe(moe_params, configs[1], tokens, count, runtime=runtime, collect_layers=per_layer)
    seen_BT, mask_BT = batch["segment_ids"] > 0, batch["loss_mask"].astype(jnp.float32)
    chunk = min(seen_BT.shape[1], max(1, logit_elements // (configs[0].vocab_size * seen_BT.shape[0])))
    columns = (dense.hidden_BTD, moe.hidden_BTD, batch["targets"], mask_BT, seen_BT)
    count = -(-seen_BT.shape[1] // chunk)
    chunked = [_chunks(x, chunk, count) for x in columns]
    projections = (models.projection(dense_params), models.projection(moe_params))

    def step(total, xs):
        one = _compare_logits(xs, projections)
        return {name: (jnp.maximum if name in _JOIN else jnp.add)(total[name], one[name]) for name in one}, None

    zero = dict.fromkeys(("max_error", "max_logit", "loss_dense", "loss_moe", "kl"), jnp.zeros(()))
    total, _ = jax.lax.scan(step, zero, chunked)
    total |= counts | {"tokens": jnp.sum(mask_BT)}
    if moe.router is not None:
        total["seen"] = jnp.sum(seen_BT).astype(jnp.float32)
        total["load"] = moe.router.load_E * total["seen"]
    if per_layer:
        seen = seen_BT[None, :, :, None]
        a, b = (jnp.asarray(output.layers_LBTD, jnp.float32) * seen for output in (dense, moe))
        total["layer_error"] = jnp.sum(jnp.square(a - b), axis=(1, 2, 3))
        total["layer_size"] = jnp.sum(jnp.square(a), axis=(1, 2, 3))
    return total


def _compare_logits(columns: Sequence[jax.Array], projections: Sequence[jax.Array]) -> dict[str, jax.Array]:
    """The same for one chunk of C tokens per row."""
    dense_BCD, moe_BCD, targets_BC, mask_BC, seen_BC = columns
    a, b = (models.logits(x, w) for x, w in zip((dense_BCD, moe_BCD), projections))
    log_a, log_b = jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1)
    kl_BC = jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
    chosen_a, chosen_b = (jnp.take_along_axis(x, targets_BC[:, :, None], axis=-1)[:, :, 0] for x in (log_a, log_b))
    seen = seen_BC[:, :, None]
    return {
        "max_error": jnp.max(jnp.where(seen, jnp.abs(a - b), 0.0)),
        "max_logit": jnp.max(jnp.where(seen, jnp.abs(a), 0.0)),
        "loss_dense": -jnp.sum(mask_BC * chosen_a),
        "loss_moe": -jnp.sum(mask_BC * chosen_b),
        "kl": jnp.sum(mask_BC * kl_BC),
    }


def _chunks(x: jax.Array, chunk: int, count: int) -> jax.Array:
    """[B, T, ...] to [count, B, chunk, ...], padded with zeros (mask 0): the batch axis stays whole and sharded."""
    widths = [(0, 0), (0, chunk * count - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    padded = jnp.pad(x, widths).reshape(x.shape[0], count, chunk, *x.shape[2:])
    return jnp.moveaxis(padded, 1, 0)
