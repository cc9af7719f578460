"""The language-model loss with the balance losses of a mixture."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Weights of the auxiliary losses of a mixture."""

    load: float = 0.01
    z: float = 0.001

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if not value >= 0:
                raise UserError(f"{value} is negative", where=f"balance.{name}", remedy="use 0 or more")


def load_balance_loss(router: models.RouterStatistics) -> jax.Array:
    """Mean over layers of E/X * sum_e load_e * probability_e (Fedus et al. 2021, over the global batch): 1 if uniform."""
    experts = router.load_E.shape[-1]
    chosen_L = jnp.maximum(jnp.sum(router.load_E, axis=-1), 1e-6)
    per_layer_L = experts * jnp.sum(router.load_E * router.probability_E, axis=-1) / chosen_L
    return jnp.mean(per_layer_L)


def router_metrics(router: models.RouterStatistics) -> dict[str, jax.Array]:
    """Metrics of a mixture: load by layer and expert as shares that sum to 1, and how uneven it is."""
    share_LE = router.load_E / jnp.maximum(jnp.sum(router.load_E, axis=-1, keepdims=True), 1e-6)
    return {
        "load_balance_loss": load_balance_loss(router),
        "router_z_loss": jnp.mean(router.z),
        "router_entropy": jnp.mean(router.entropy),
        "router_confidence": jnp.mean(router.confidence),
        "expert_load": share_LE,
        "expert_load_max_over_mean": jnp.mean(jnp.max(share_LE, axis=-1)) * share_LE.shape[-1],
    }


def run_model(
    params: Any, config: models.ModelConfig, batch: Batch, runtime: models.Runtime, *, collect_layers: bool = False
) -> models.Output:
    """A forward pass over a batch of the loader."""
    return models.forward(
        params,
        config,
        batch["inputs"],
        batch["positions"],
        batch["segment_ids"],
        runtime=runtime,
        collect_layers=collect_layers,
    )


def language_model_loss(
    params: Any, config: models.ModelConfig, batch: Batch, *, runtime: models.Runtime, balance: BalanceConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy per unmasked token plus balance losses.

    Returns:
      The loss to minimise, and metrics: "loss" is the cross-entropy alone, nats per token; "tokens" counts the mask.
    """
    output = run_model(params, config, batch, runtime)
    tokens = jnp.sum(batch["loss_mask"])
    total = models.cross_entropy(output.hidden_BTD, models.projection(params), batch["targets"], batch["loss_mask"])
    cross_entropy = total / jnp.maximum(tokens, 1.0)
    metrics = {"loss": cross_entropy, "tokens": tokens}
    if output.router is None:
        return cross_entropy, metrics
    metrics |= router_metrics(output.router)
    loss = cross_entropy + balance.load * metrics["load_balance_loss"] + balance.z * metrics["router_z_loss"]
    return loss, metrics
