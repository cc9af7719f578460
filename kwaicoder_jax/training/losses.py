"""The language-model loss with the balance losses of a mixture."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps the experts of a mixture evenly used.

    Attributes:
      load: weight of the load-balance loss over the global batch.
      z: weight of the router's z-loss.
      sequence: weight of the load-balance loss within each row.
      bias_rate: by how much the selection bias of each expert moves after a step, up for one that was used less than the
        mean and down for one that was used more (DeepSeek-V3, 2412.19437, section 2.1.2, gamma); for models with a
        router_bias. It needs no loss: set `load` to 0.
      capacity_factor: rows that an expert takes of a sequence, over those of even routing; what is beyond adds nothing to
        its token (GShard, 2006.16668; Switch, 2101.03961). None drops nothing. It holds for training steps alone:
        validation and whatever comes later see the whole mixture.
    """

    load: float = 0.01
    z: float = 0.001
    sequence: float = 0.0
    bias_rate: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self):
        for name in ("load", "z", "sequence", "bias_rate"):
            value = getattr(self, name)
            if not value >= 0:
                raise UserError(f"{value} is negative", where=f"balance.{name}", remedy="use 0 or more")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f"{self.capacity_factor} is no capacity", where="balance.capacity_factor",
                remedy="use a number above 0, such as 1.25, or None to drop nothing",
            )  # fmt: skip


def load_balance_loss(router: models.RouterStatistics) -> jax.Array:
    """Mean over layers of E/X * sum_e load_e * probability_e (Fedus et al. 2021, over the global batch): 1 if uniform."""
    experts = router.load_E.shape[-1]
    chosen_L = jnp.maximum(jnp.sum(router.load_E, axis=-1), 1e-6)
    per_layer_L = experts * jnp.sum(router.load_E * router.probability_E, axis=-1) / chosen_L
    return jnp.mean(per_layer_L)


def router_metrics(router: models.RouterStatistics) -> dict[str, jax.Array]:
    """Metrics of a mixture: load by layer and expert as shares that sum to 1, how uneven it is, and what was dropped."""
    share_LE = router.load_E / jnp.maximum(jnp.sum(router.load_E, axis=-1, keepdims=True), 1e-6)
    dropped = {} if router.dropped is None else {"dropped_share": jnp.mean(router.dropped)}
    return dropped | {
        "load_balance_loss": load_balance_loss(router),
        "sequence_balance_loss": jnp.mean(router.sequence_balance),
        "router_z_loss": jnp.mean(router.z),
        "router_entropy": jnp.mean(router.entropy),
        "router_confidence": jnp.mean(router.confidence),
        "expert_load": share_LE,
        "expert_load_max_over_mean": jnp.mean(jnp.max(share_LE, axis=-1)) * share_LE.shape[-1],
    }


def run_model(
    params: Any, config: models.ModelConfig, batch: Batch, runtime: models.Runtime, *,
    collect_layers: bool = False, capacity_factor: float | None = None,
) -> models.Output:  # fmt: skip
    """A forward pass over a batch of the loader."""
    return models.forward(
        params,
        config,
        batch["inputs"],
        batch["positions"],
        batch["segment_ids"],
        runtime=runtime,
        collect_layers=collect_layers,
        capacity_factor=capacity_factor,
    )


def language_model_loss(
    params: Any, config: models.ModelConfig, batch: Batch, *, runtime: models.Runtime, balance: BalanceConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy per unmasked token plus balance losses.

    Returns:
      The loss to minimise, and metrics: "loss" is the cross-entropy alone, nats per token; "tokens" counts the mask.
    """
    output = run_model(params, config, batch, runtime, capacity_factor=balance.capacity_factor)
    tokens = jnp.sum(batch["loss_mask"])
    total = models.cross_entropy(
        output.hidden_BTD, models.projection(params), batch["targets"], batch["loss_mask"],
        scatter_stage=runtime.scatter_stage,
    )  # fmt: skip
    cross_entropy = total / jnp.maximum(tokens, 1.0)
    metrics = {"loss": cross_entropy, "tokens": tokens}
    if output.router is None:
        return cross_entropy, metrics
    metrics |= router_metrics(output.router)
    return cross_entropy + balance_loss(metrics, balance), metrics


def balance_loss(metrics: dict[str, jax.Array], balance: BalanceConfig) -> jax.Array:
    """The weighted sum of what `router_metrics` gives."""
    loss = balance.load * metrics["load_balance_loss"] + balance.z * metrics["router_z_loss"]
    return loss + balance.sequence * metrics["sequence_balance_loss"] if balance.sequence else loss


def move_biases(params: Any, metrics: dict[str, jax.Array], rate: float) -> Any:
    """The parameters with each expert's selection bias moved by `rate` towards an even load; nothing else changes."""
    moe = params["layers"]["moe"]
    share_LE = metrics["expert_load"]
    moved_LE = moe["router_bias"] + rate * jnp.sign(1.0 / share_LE.shape[-1] - share_LE)
    return {**params, "layers": {**params["layers"], "moe": {**moe, "router_bias": moved_LE}}}
