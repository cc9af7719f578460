"""How far one model is from another on real tokens: logits, losses, KL, layers. Neither has to be a mixture."""

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import groups
from kwaicoder_jax.transforms.activations import observe
from kwaicoder_jax.transforms.batches import TARGETS, Batch, entries
from kwaicoder_jax.transforms.divergence import LARGEST, compare
from kwaicoder_jax.transforms.report import Report


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
        arrays = dict(zip(TARGETS, entries(batch, number, TARGETS)))
        with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
            one = _compare(
                dense_params, moe_params, arrays,
                configs=(dense_config, moe_config), runtime=runtime or models.Runtime(), per_layer=per_layer,
                granularity=granularity if moe_config.experts else None, logit_elements=logit_elements,
            )  # fmt: skip
        one = jax.tree.map(lambda x: np.asarray(x, np.float64), one)
        if total is not None:
            one = {name: (np.maximum if name in LARGEST else np.add)(total[name], one[name]) for name in one}
        total = one
    if total is None or total["tokens"] == 0:
        raise UserError("no tokens to compare on", where="batches", remedy="give a batch with an open loss mask")
    layers = np.sqrt(total["layer_error"] / total["layer_size"]).tolist() if per_layer else None
    return Report(
        max_relative_logit_error=float(total["max_error"] / total["max_logit"]),
        valid_loss_dense=float(total["loss"] / total["tokens"]),
        valid_loss_moe=float(total["other_loss"] / total["tokens"]),
        kl_dense_to_moe=float(total["kl"] / total["tokens"]),
        tokens=float(total["tokens"]),
        layer_relative_error_L=layers,
        load_LE=(total["load"] / total["seen"]).tolist() if "load" in total else None,
        border_ties_L=total["ties"].astype(int).tolist() if "ties" in total else None,
        broken_groups_L=total["broken"].astype(int).tolist() if "ties" in total else None,
    )


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
    projections = (models.projection(dense_params), models.projection(moe_params))
    total = compare((dense.hidden_BTD, moe.hidden_BTD), projections, batch, logit_elements)
    total |= counts | {"tokens": jnp.sum(batch["loss_mask"].astype(jnp.float32))}
    seen_BT = batch["segment_ids"] > 0
    if moe.router is not None:
        total["seen"] = jnp.sum(seen_BT).astype(jnp.float32)
        total["load"] = moe.router.load_E * total["seen"]
    if per_layer:
        seen = seen_BT[None, :, :, None]
        a, b = (jnp.asarray(output.layers_LBTD, jnp.float32) * seen for output in (dense, moe))
        total["layer_error"] = jnp.sum(jnp.square(a - b), axis=(1, 2, 3))
        total["layer_size"] = jnp.sum(jnp.square(a), axis=(1, 2, 3))
    return total
