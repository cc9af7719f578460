"""Distillation: losses on logits and on mapped hidden states, their balance, and a cache of the teacher's logits."""

from kwaicoder_jax.distillation.cache import CacheReader, CacheWriter, Header, finish
from kwaicoder_jax.distillation.divergences import LogitsLoss
from kwaicoder_jax.distillation.hidden import hidden_loss, layer_map, selection_matrix
from kwaicoder_jax.distillation.lineage import kept_of
from kwaicoder_jax.distillation.logits import LogitsSettings, cached_logits_loss, forward_kl, logits_loss, teacher_top_k
from kwaicoder_jax.distillation.loss import DistillConfig, distillation_loss, initial_projections
from kwaicoder_jax.distillation.support import TopK

__all__ = [
    "CacheReader",
    "CacheWriter",
    "DistillConfig",
    "Header",
    "LogitsLoss",
    "LogitsSettings",
    "TopK",
    "cached_logits_loss",
    "distillation_loss",
    "finish",
    "forward_kl",
    "hidden_loss",
    "initial_projections",
    "kept_of",
    "layer_map",
    "logits_loss",
    "selection_matrix",
    "teacher_top_k",
]
