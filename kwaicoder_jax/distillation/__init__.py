"""Distillation: forward KL on logits, mapped hidden states, their balance."""

from kwaicoder_jax.distillation.hidden import hidden_loss, layer_map, selection_matrix
from kwaicoder_jax.distillation.logits import forward_kl
from kwaicoder_jax.distillation.loss import DistillConfig, distillation_loss, initial_projections

__all__ = [
    "DistillConfig",
    "distillation_loss",
    "forward_kl",
    "hidden_loss",
    "initial_projections",
    "layer_map",
    "selection_matrix",
]
