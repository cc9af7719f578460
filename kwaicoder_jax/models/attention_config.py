"""The description of attention's variants: scaled rotary positions, norms of queries and keys, latent attention."""

import dataclasses
import enum

from kwaicoder_jax.errors import UserError


class RopeKind(enum.StrEnum):
    """How rotary frequencies are changed for positions beyond those of the first training."""

    LINEAR = "linear"  # all divided by the factor (Chen et al. 2023, arXiv 2306.15595)
    DYNAMIC = "dynamic"  # a base that grows with the sequence once it is longer than max_length ("dynamic NTK")
    YARN = "yarn"  # divided by the factor where they turn seldom, a ramp between (Peng et al. 2023, arXiv 2309.00071)
    LLAMA3 = "llama3"  # the same idea with a ramp over wavelengths (Llama 3.1)


class QkNorm(enum.StrEnum):
    """RMSNorm of queries and keys before the rotary embedding."""

    NONE = "none"
    HEAD = "head"  # over each head, one scale [N] for all (Qwen3, GLM-4-MoE)
    FULL = "full"  # over all heads at once, a scale [H, N] and [K, N] (OLMoE)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaled rotary frequencies; names and meaning are those of transformers' `modeling_rope_utils`.

    Attributes:
      kind: a value of RopeKind.
      factor: how much longer than the original the context is.
      original_length: positions of the first training (yarn, llama3).
      low_freq_factor: wavelengths above original_length over this are divided by the factor (llama3).
      high_freq_factor: wavelengths below original_length over this are left alone (llama3).
      beta_fast: dimensions that turn more often than this over original_length are left alone (yarn).
      beta_slow: those that turn less often are divided by the factor (yarn).
      mscale: see attention_factor (yarn).
      mscale_all_dim: see attention_factor (yarn). Under latent attention the scores are also multiplied by
        (0.1 mscale_all_dim log(factor) + 1)^2, as in DeepSeek-V2 and V3.
      attention_factor: on the cosines and sines, of queries and of keys (yarn). None derives it:
        m(mscale) / m(mscale_all_dim) where both are given, else m(1), with m(s) = 0.1 s log(factor) + 1.
      truncate: round the borders of the ramp to whole dimensions (yarn).
    """

    kind: RopeKind
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self):
        object.__setattr__(self, "kind", RopeKind(self.kind))
        if not self.factor >= 1:
            raise UserError(f"{self.factor} is no factor", where="model.rope_scaling.factor", remedy="use 1 or more")
        if self.kind in (RopeKind.YARN, RopeKind.LLAMA3) and not (self.original_length or 0) > 0:
            raise UserError(
                f"{self.kind} needs the length of the first training", where="model.rope_scaling.original_length",
                remedy="use the positions that the model was first trained on",
            )  # fmt: skip
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise UserError(
                f"{self.low_freq_factor} is not below {self.high_freq_factor}",
                where="model.rope_scaling.low_freq_factor", remedy="use less than high_freq_factor",
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values out of one latent.

    Attributes:
      q_rank: width of the queries' latent; 0 projects the queries from the hidden states.
      kv_rank: width of the latent that keys and values are made of, and that a cache holds.
      nope_dim: part of a head's query and key without positions; it comes first.
      rope_dim: part with rotary positions; of keys it is one for all heads.
      value_dim: width of a head's value.
      norm_epsilon: of the norms on both latents (1e-6 in transformers, whatever the model's other norms have).
    """

    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    norm_epsilon: float = 1e-6

    def __post_init__(self):
        for name in ("q_rank", "kv_rank", "nope_dim", "rope_dim", "value_dim"):
            if getattr(self, name) < (name != "q_rank"):
                raise UserError(
                    f"{getattr(self, name)} is not a size", where=f"model.mla.{name}", remedy="use 1 or more"
                )
        if self.rope_dim % 2:
            raise UserError(
                f"{self.rope_dim} is odd", where="model.mla.rope_dim", remedy="rotary embedding needs an even width"
            )
