"""The distillation loss: logits, hidden states, and labels, balanced as in the recipe."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.distillation.divergences import LogitsLoss
from kwaicoder_jax.distillation.hidden import KINDS, hidden_loss, selection_matrix
from kwaicoder_jax.distillation.logits import LogitsSettings, cached_logits_loss, logits_loss
from kwaicoder_jax.distillation.support import TopK
from kwaicoder_jax.errors import UserError

ROUNDING = 1e-6  # a relative distance below this is float32 noise: a weight that balances it would amplify noise
CACHED = ("ids_BTK", "log_p_BTK", "log_tail_BT")  # of TopK; names of a batch's arrays from a teacher's cache

RouterLoss = Callable[[models.RouterStatistics], tuple[jax.Array, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Weights of the terms.

    Attributes:
      temperature: of the logits; see `LogitsSettings`, also for the next three.
      logits_loss: a value of LogitsLoss.
      skew: of "skewed_kl".
      top_k: the teacher's K likeliest tokens and the rest as one bucket; None for the whole vocabulary, or with a cache
        for all that it holds.
      hidden: whether to teach hidden states too; their weight is dynamic, logits loss over hidden loss (Minitron).
      hidden_loss: "mse" or "cosine".
      cross_entropy: weight of the loss on labels; 0 is the logits loss alone.
    """

    temperature: float = 1.0
    logits_loss: LogitsLoss = LogitsLoss.FORWARD_KL
    skew: float = 0.1
    top_k: int | None = None
    hidden: bool = True
    hidden_loss: str = "mse"
    cross_entropy: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"{self.temperature} is not positive", where="loss.temperature", remedy="1 is usual")
        if self.logits_loss not in list(LogitsLoss):
            raise UserError(f"no loss {self.logits_loss!r}", where="loss.logits_loss", remedy=", ".join(LogitsLoss))
        object.__setattr__(self, "logits_loss", LogitsLoss(self.logits_loss))
        if not 0 < self.skew < 1:
            raise UserError(f"{self.skew} is not between 0 and 1", where="loss.skew", remedy="0.1 is usual")
        if self.top_k is not None:
            self._check_top_k(self.top_k)
        if self.hidden_loss not in KINDS:
            raise UserError(f"no loss {self.hidden_loss!r}", where="loss.hidden_loss", remedy=" or ".join(KINDS))
        if not self.cross_entropy >= 0:
            raise UserError(f"{self.cross_entropy} is negative", where="loss.cross_entropy", remedy="use 0 or more")

    def _check_top_k(self, count: int) -> None:
        if count < 1:
            raise UserError(f"{count} is less than 1", where="loss.top_k", remedy="use 1 or more, or None for all")
        if not self.logits_loss.of_distributions:
            what = f"{self.logits_loss} compares logits, and a bucket of many tokens has none"
            raise UserError(what, where="loss.top_k", remedy="use None, or a divergence of distributions")


def initial_projections(
    pairs: Sequence[tuple[int, int]], kept_channels: Sequence[int], teacher_dim: int
) -> dict[str, np.ndarray]:
    """Projections from student to teacher width: "embedding" [D', D] and "layers" [P, D', D], all selection matrices."""
    matrix_DC = selection_matrix(kept_channels, teacher_dim)
    return {"embedding": matrix_DC, "layers": np.stack([matrix_DC] * len(pairs))}


def distillation_loss(
    trainable: Any,
    batch: dict[str, jax.Array],
    teacher: Any,
    *,
    student_config: models.ModelConfig,
    teacher_config: models.ModelConfig | None,
    pairs: Sequence[tuple[int, int]],
    config: DistillConfig,
    runtime: models.Runtime,
    router_loss: RouterLoss | None = None,
    shards: int = 1,
    capacity_factor: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = L_logits + alpha * L_hidden + w * L_labels, alpha = L_logits / L_hidden without gradient (RECIPE: Minitron).

    Args:
      trainable: {"model": student params, "projections": from `initial_projections`}.
      batch: a batch of the loader; `loss_mask` weighs every term. Without a teacher also what `CacheReader.add` adds.
      teacher: its params; not trained.
      student_config: the student, dense or a mixture.
      teacher_config: the teacher, dense or a mixture; None if the batch holds its logits. `config.hidden` is off then.
      pairs: (student layer, teacher layer) whose outputs are compared.
      config: weights.
      runtime: how both are computed; the teacher is not quantised.
      router_loss: of a student that is a mixture: what is added to the loss, and metrics.
      shards: devices that the rows of the batch are spread over.
      capacity_factor: of a student that is a mixture, see `models.forward`; a teacher drops nothing.

    Returns:
      The loss, and metrics; "loss" is the logits loss per token (the KL by default), since that is what it minimises first.
    """
    mask_BT, params = batch["loss_mask"], trainable["model"]
    tokens = jnp.maximum(jnp.sum(mask_BT), 1.0)
    output = _run(params, student_config, batch, runtime, config.hidden, capacity_factor)
    student = (output.hidden_BTD, models.projection(params))
    settings = LogitsSettings(config.logits_loss, config.temperature, config.skew, config.top_k, shards)
    if teacher_config is None:
        total = cached_logits_loss(settings, *student, TopK(**{name: batch[name] for name in CACHED}), mask_BT)
    else:
        exact = dataclasses.replace(runtime, quantization=models.Quantization.NONE)
        guide = jax.lax.stop_gradient(_run(teacher, teacher_config, batch, exact, config.hidden))
        teacher_VC = jax.lax.stop_gradient(models.projection(teacher))
        total = logits_loss(settings, *student, guide.hidden_BTD, teacher_VC, mask_BT)
    loss, metrics = total / tokens, {"loss": total / tokens, "tokens": jnp.sum(mask_BT)}
    if config.hidden:
        distance = _hidden_distance(trainable["projections"], output, guide, pairs, mask_BT, config.hidden_loss)
        alpha = jax.lax.stop_gradient(metrics["loss"] / jnp.maximum(distance, ROUNDING))
        loss += alpha * distance
        metrics |= {"hidden_loss": distance, "hidden_weight": alpha}
    if config.cross_entropy:
        total = models.cross_entropy(*student, batch["targets"], mask_BT)
        loss += config.cross_entropy * total / tokens
        metrics["cross_entropy"] = total / tokens
    if output.router is not None and router_loss is not None:
        balance, more = router_loss(output.router)
        loss, metrics = loss + balance, metrics | more
    return loss, metrics


def _run(
    params: Any, config: models.ModelConfig, batch: dict[str, jax.Array], runtime: models.Runtime, layers: bool,
    capacity_factor: float | None = None,
) -> models.Output:  # fmt: skip
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    return models.forward(
        params, config, *inputs, runtime=runtime, collect_layers=layers, capacity_factor=capacity_factor
    )


def compared(teacher: models.Output, layers: Sequence[int]) -> jax.Array:
    """The residual stream after some layers, [P, B, T, C].

    Taken one by one: where layers are unrolled, XLA then keeps no other. A scan stacks the states of all its layers.
    """
    assert teacher.layers_LBTD is not None
    return jnp.stack([teacher.layers_LBTD[layer] for layer in layers])


def _hidden_distance(projections, student, teacher, pairs, mask_BT, kind) -> jax.Array:
    """Embedding output and mapped layers, each layer with the same weight."""
    student_layers = np.asarray([pair[0] for pair in pairs])
    teacher_PBTC = compared(teacher, [pair[1] for pair in pairs])
    at_layers = hidden_loss(student.layers_LBTD[student_layers], projections["layers"], teacher_PBTC, mask_BT, kind)
    at_embedding = hidden_loss(
        student.embedded_BTD[None], projections["embedding"][None], teacher.embedded_BTD[None], mask_BT, kind
    )
    return (len(pairs) * at_layers + at_embedding) / (len(pairs) + 1)
