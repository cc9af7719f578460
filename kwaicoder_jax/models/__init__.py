"""Flax Linen models, dense and mixture, from one frozen config; logical axes are declared with each parameter."""

from kwaicoder_jax.models.attention import Cache
from kwaicoder_jax.models.attention_config import MlaConfig, QkNorm, RopeKind, RopeScaling
from kwaicoder_jax.models.config import Dispatch, ModelConfig, Runtime
from kwaicoder_jax.models.context_order import multiple as context_multiple
from kwaicoder_jax.models.experts_config import ExpertsConfig, GroupScore, Router
from kwaicoder_jax.models.flops import decode_flops_per_token, forward_flops_per_token, train_flops_per_token
from kwaicoder_jax.models.moe import RouterStatistics, choose_experts
from kwaicoder_jax.models.parameters import (
    AS_STORED,
    Declaration,
    Params,
    abstract,
    check,
    count,
    count_active,
    declarations,
    empty_cache,
    flatten,
    forward,
    init,
    unflatten,
)
from kwaicoder_jax.models.quantization import Quantization
from kwaicoder_jax.models.remat import Remat
from kwaicoder_jax.models.rotary import is_dynamic
from kwaicoder_jax.models.statistics import sequence_statistics
from kwaicoder_jax.models.stored import StoredMatrix
from kwaicoder_jax.models.transformer import Output, Transformer
from kwaicoder_jax.models.vocabulary import cross_entropy, logits, projection

__all__ = [
    "AS_STORED",
    "Cache",
    "Declaration",
    "Dispatch",
    "ExpertsConfig",
    "GroupScore",
    "MlaConfig",
    "ModelConfig",
    "Output",
    "Params",
    "QkNorm",
    "Quantization",
    "Remat",
    "RopeKind",
    "RopeScaling",
    "Router",
    "RouterStatistics",
    "Runtime",
    "StoredMatrix",
    "Transformer",
    "abstract",
    "check",
    "choose_experts",
    "context_multiple",
    "count",
    "count_active",
    "cross_entropy",
    "declarations",
    "decode_flops_per_token",
    "empty_cache",
    "flatten",
    "forward",
    "forward_flops_per_token",
    "init",
    "is_dynamic",
    "logits",
    "projection",
    "sequence_statistics",
    "train_flops_per_token",
    "unflatten",
]
