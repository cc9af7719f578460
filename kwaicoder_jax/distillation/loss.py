"""The distillation loss: logits, hidden states, and labels, balanced as in the recipe."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.distillation.hidden import KINDS, hidden_loss, selection_matrix
from kwaicoder_jax.distillation.logits import forward_kl
from kwaicoder_jax.errors import UserError

ROUNDING = 1e-6  # a relative distance below this is float32 noise: a weight that balances it would amplify noise


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """Weights of the terms.

    Attributes:
      temperature: of the logits.
      hidden: whether to teach hidden states too; their weight is dynamic, logits loss over hidden loss (Minitron).
      hidden_loss: "mse" or "cosine".
      cross_entropy: weight of the loss on labels; 0 is KL alone.
    """

    temperature: float = 1.0
    hidden: bool = True
    hidden_loss: str = "mse"
    cross_entropy: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"{self.temperature} is not positive", where="loss.temperature", remedy="1 is usual")
        if self.hidden_loss not in KINDS:
            raise UserError(f"no loss {self.hidden_loss!r}", where="loss.hidden_loss", remedy=" or ".join(KINDS))
        if not self.cross_entropy >= 0:
            raise UserError(f"{self.cross_entropy} is negative", where="loss.cross_entropy", remedy="use 0 or more")


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
    teacher_config: models.ModelConfig,
    pairs: Sequence[tuple[int, int]],
    config: DistillConfig,
    runtime: models.Runtime,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = L_logits + alpha * L_hidden + w * L_labels, alpha = L_logits / L_hidden without gradient (RECIPE: Minitron).

    Args:
      trainable: {"model": student params, "projections": from `initial_projections`}.
      batch: a batch of the loader; `loss_mask` weighs every term.
      teacher: its params; not trained.
      student_config: the student.
      teacher_config: the teacher.
      pairs: (student layer, teacher layer) whose outputs are compared.
      config: weights.
      runtime: how both are computed.

    Returns:
      The loss, and metrics; "loss" is the KL per token, since that is what it minimises first.
    """
    mask_BT = batch["loss_mask"]
    tokens = jnp.maximum(jnp.sum(mask_BT), 1.0)
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    guide = models.forward(teacher, teacher_config, *inputs, runtime=runtime, collect_layers=config.hidden)
    guide = jax.lax.stop_gradient(guide)
    params = trainable["model"]
    output = models.forward(params, student_config, *inputs, runtime=runtime, collect_layers=config.hidden)

    student_VD, teacher_VC = models.projection(params), jax.lax.stop_gradient(models.projection(teacher))
    kl = forward_kl(output.hidden_BTD, student_VD, guide.hidden_BTD, teacher_VC, mask_BT, config.temperature) / tokens
    loss, metrics = kl, {"loss": kl, "tokens": jnp.sum(mask_BT)}
    if config.hidden:
        distance = _hidden_distance(trainable["projections"], output, guide, pairs, mask_BT, config.hidden_loss)
        alpha = jax.lax.stop_gradient(kl / jnp.maximum(distance, ROUNDING))
        loss += alpha * distance
        metrics |= {"hidden_loss": distance, "hidden_weight": alpha}
    if config.cross_entropy:
        total = models.cross_entropy(output.hidden_BTD, student_VD, batch["targets"], mask_BT)
        loss += config.cross_entropy * total / tokens
        metrics["cross_entropy"] = total / tokens
    return loss, metrics


def _hidden_distance(projections, student, teacher, pairs, mask_BT, kind) -> jax.Array:
    """Embedding output and mapped layers, each layer with the same weight."""
    student_layers = np.asarray([pair[0] for pair in pairs])
    teacher_layers = np.asarray([pair[1] for pair in pairs])
    at_layers = hidden_loss(
        student.layers_LBTD[student_layers], projections["layers"], teacher.layers_LBTD[teacher_layers], mask_BT, kind
    )
    at_embedding = hidden_loss(
        student.embedded_BTD[None], projections["embedding"][None], teacher.embedded_BTD[None], mask_BT, kind
    )
    return (len(pairs) * at_layers + at_embedding) / (len(pairs) + 1)
