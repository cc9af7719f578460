"""The one description of a model: a frozen dataclass that initialisation, transforms, checkpoints and exports share.

Dimension letters, here and everywhere:
    B batch  T time  S cached time  D model  L layers  H query heads  K KV heads  N head width  F MLP neurons
    V vocabulary  E experts  X experts per token  M tokens in one flat list
"""

import dataclasses
import enum
import math
from collections.abc import Iterable
from typing import Any

from kernels import grouped_matmul
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.attention_ops import AttentionBackend

DTYPES = ("float32", "bfloat16", "float16")


class Router(enum.StrEnum):
    """How router logits become the combine weights of the X selected experts (always in float32)."""

    TOPK_SOFTMAX = "topk_softmax"  # top-k of the logits, softmax over the selected (Mixtral)
    SOFTMAX_TOPK_RENORMALISED = "softmax_topk_renormalised"  # the same function in another order (Qwen3-MoE)
    SOFTMAX_TOPK = "softmax_topk"  # softmax over all, top-k, not renormalised (OLMoE, Qwen2-57B-A14B)
    SIGMOID = "sigmoid"  # sigmoid, top-k, renormalised, times routed_scale (DeepSeek-V3)


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The mixture part of a model: E experts of `mlp_dim` neurons, X of them per token, and an always-on shared one.

    Attributes:
      num_experts: E.
      experts_per_token: X.
      mlp_dim: neurons of one expert.
      router: how logits become combine weights.
      routed_scale: what the sigmoid router multiplies its weights with.
      router_bias: whether a float32 bias per expert enters the selection, and nothing else (sigmoid router only;
        DeepSeek-V3, 2412.19437, section 2.1.2). It has no gradient; balancing moves it.
      shared_mlp_dim: neurons of the shared expert; 0 for none.
      shared_gate: whether the shared expert's output is multiplied by the sigmoid of a linear map (Qwen2-MoE).
    """

    num_experts: int
    experts_per_token: int
    mlp_dim: int
    router: Router = Router.TOPK_SOFTMAX
    routed_scale: float = 1.0
    router_bias: bool = False
    shared_mlp_dim: int = 0
    shared_gate: bool = False

    def __post_init__(self):
        object.__setattr__(self, "router", Router(self.router))
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise UserError(
                f"{self.experts_per_token} of {self.num_experts} experts", where="experts.experts_per_token",
                remedy="choose between 1 and num_experts",
            )  # fmt: skip
        if self.mlp_dim < 1 or self.shared_mlp_dim < 0:
            raise UserError(f"experts of {self.mlp_dim} and {self.shared_mlp_dim} neurons", where="experts.mlp_dim")
        if self.router_bias and self.router is not Router.SIGMOID:
            raise UserError(
                f"router {self.router} has no selection bias", where="experts.router_bias", remedy="use sigmoid"
            )
        if self.shared_gate and not self.shared_mlp_dim:
            raise UserError(
                "there is no shared expert to gate", where="experts.shared_gate", remedy="set shared_mlp_dim"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: GQA, RoPE, RMSNorm, SwiGLU, dense or (with `experts`) a mixture in every layer."""

    vocab_size: int
    layers: int
    model_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = "float32"  # of the computation
    param_dtype: str = "float32"  # of the stored parameters
    experts: ExpertsConfig | None = None

    def __post_init__(self):
        for name in ("vocab_size", "layers", "model_dim", "heads", "kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{getattr(self, name)} is not a size", where=f"model.{name}", remedy="use 1 or more")
        if self.heads % self.kv_heads:
            raise UserError(
                f"{self.heads} query heads do not share {self.kv_heads} KV heads evenly", where="model.kv_heads",
                remedy="choose a divisor of model.heads",
            )  # fmt: skip
        if self.head_dim % 2:
            raise UserError(
                f"{self.head_dim} is odd", where="model.head_dim", remedy="rotary embedding needs an even width"
            )

        _check_numbers(self)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds a config from plain values; an unknown field is a UserError that names it."""
        values = dict(values)
        if values.get("experts"):
            values["experts"] = _build(ExpertsConfig, dict(values["experts"]), "model.experts")
        return _build(cls, values, "model")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError("no such field", where=f"{where}.{unknown[0]}", remedy=f"the fields are {sorted(known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(str(error), where=where, remedy=f"the fields are {sorted(known)}") from error


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model is computed, not what it computes: nothing here changes a result beyond rounding.

    Attributes:
      remat: what the backward pass recomputes: "none", or "full" (every layer from its input).
      scan_unroll: layers per iteration of the scan over layers; 0 unrolls them all.
      attention: back end of attention, see `attention_ops.AttentionBackend`.
      experts: back end of the grouped matmul, see `kernels.grouped_matmul.Backend`.
    """

    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    experts: str = "auto"

    def __post_init__(self):
        choices: dict[str, Iterable[str]] = {
            "remat": ("none", "full"),
            "attention": AttentionBackend,
            "experts": grouped_matmul.Backend,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in list(allowed):
                remedy = f"use {', '.join(allowed)}"
                raise UserError(f"no choice {getattr(self, name)!r}", where=f"runtime.{name}", remedy=remedy)
        if self.scan_unroll < 0:
            raise UserError(f"{self.scan_unroll} layers", where="runtime.scan_unroll", remedy="use 1, or 0 for all")


def _check_numbers(config: ModelConfig) -> None:
    """Refuses numbers with which every loss is NaN, and dtypes that there are not."""
    for name, least in (
        ("rope_theta", "more than 0"),
        ("norm_epsilon", "more than 0"),
        ("initializer_range", "0 or more"),
    ):
        value = getattr(config, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and least != "0 or more"):
            raise UserError(f"{value} cannot be", where=f"model.{name}", remedy=f"use a finite number, {least}")
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) not in DTYPES:
            remedy = f"use {', '.join(DTYPES)}"
            raise UserError(f"no dtype {getattr(config, name)!r}", where=f"model.{name}", remedy=remedy)
