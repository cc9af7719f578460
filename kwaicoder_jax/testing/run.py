"""The model on a batch in one call, jitted: what nearly every test begins with."""

from collections.abc import Mapping
from typing import Any

import jax

from kwaicoder_jax import models
from kwaicoder_jax.models import ModelConfig, Output, Params, Runtime

_forward = jax.jit(models.forward, static_argnames=("config", "runtime", "collect_layers", "statistics"))


def run(params: Params, config: ModelConfig, batch: Mapping[str, Any], **options: Any) -> Output:
    """`models.forward` on a batch as `random_batch` makes it; `options` are its keyword arguments."""
    return _forward(params, config, batch["inputs"], batch["positions"], batch["segment_ids"], **options)


def model_logits(params: Params, config: ModelConfig, batch: Mapping[str, Any], **options: Any) -> jax.Array:
    """Logits of every position, float32 [B, T, V]."""
    return models.logits(run(params, config, batch, **options).hidden_BTD, models.projection(params))


def mean_loss(
    params: Params, config: ModelConfig, batch: Mapping[str, Any], runtime: Runtime | None = None
) -> jax.Array:
    """Cross-entropy in nats per unmasked token, without auxiliary losses; differentiable in `params`."""
    output = run(params, config, batch, runtime=runtime)
    total = models.cross_entropy(output.hidden_BTD, models.projection(params), batch["targets"], batch["loss_mask"])
    return total / batch["loss_mask"].sum()
