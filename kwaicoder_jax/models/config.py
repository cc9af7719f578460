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

from kernels import grouped_matmul, routing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.attention_config import MlaConfig, QkNorm, RopeKind, RopeScaling
from kwaicoder_jax.models.attention_ops import AttentionBackend
from kwaicoder_jax.models.experts_config import ExpertsConfig
from kwaicoder_jax.models.quantization import Quantization, check_installed
from kwaicoder_jax.models.remat import Remat

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RoPE, RMSNorm, SwiGLU, dense or (with `experts`) a mixture.

    Attributes:
      vocab_size: V.
      layers: L, dense ones included.
      model_dim: D.
      heads: H.
      kv_heads: K, a divisor of H; equal to H under latent attention.
      head_dim: N of queries and keys.
      mlp_dim: F, of dense layers.
      rope_theta: base of the rotary frequencies.
      norm_epsilon: of every RMSNorm, but see `MlaConfig`.
      tie_embeddings: whether the embedding is also the vocabulary projection.
      initializer_range: standard deviation of a fresh matrix.
      dtype: of the computation.
      param_dtype: of the stored parameters.
      experts: the mixture in every layer after the first `dense_layers`; None for a dense model.
      rope_scaling: of the rotary frequencies; None leaves them alone.
      max_length: positions that the model is made for; it changes nothing but the "dynamic" rope_scaling.
      rotary_dim: how many of a head's dimensions turn with the position, the first ones (GLM's partial rotary); None for
        all. Latent attention has its own, see `MlaConfig`.
      qkv_bias: biases on queries, keys and values (Qwen2); under latent attention on the projections into the latents.
      out_bias: bias on attention's output.
      mlp_bias: biases of dense MLPs and of a shared expert: gate, up, down. For routed experts see `ExpertsConfig`.
      qk_norm: a value of QkNorm.
      qkv_clip: queries, keys and values are clipped to [-qkv_clip, qkv_clip] before the rotary embedding (OLMoE).
      windows: sliding window of each layer: a token sees so many last positions, its own included; 0 for all of them.
        () where no layer has one.
      mla: latent attention; None for grouped-query attention.
      dense_layers: so many first layers of a mixture have a dense MLP; their parameters are "dense_layers/...".
    """

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
    dtype: str = "float32"
    param_dtype: str = "float32"
    experts: ExpertsConfig | None = None
    rope_scaling: RopeScaling | None = None
    max_length: int | None = None
    rotary_dim: int | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QkNorm = QkNorm.NONE
    qkv_clip: float | None = None
    windows: tuple[int, ...] = ()
    mla: MlaConfig | None = None
    dense_layers: int = 0

    def __post_init__(self):
        object.__setattr__(self, "qk_norm", QkNorm(self.qk_norm))
        object.__setattr__(self, "windows", tuple(self.windows) if any(self.windows) else ())
        for name in ("vocab_size", "layers", "model_dim", "heads", "kv_heads", "head_dim", "mlp_dim"):
            if getattr(self, name) < 1:
                raise _error(name, f"{getattr(self, name)} is not a size", "use 1 or more")
        _check_numbers(self)
        if self.heads % self.kv_heads:
            what = f"{self.heads} query heads do not share {self.kv_heads} KV heads evenly"
            raise _error("kv_heads", what, "choose a divisor of model.heads")
        if self.mla is None:
            self._check_rotary()
        else:
            self._check_latent(self.mla)
        if self.rope_scaling is not None and self.rope_scaling.kind is RopeKind.DYNAMIC and not self.max_length:
            raise _error("max_length", "dynamic rope_scaling starts behind it", "set the positions of the training")
        if self.windows and (len(self.windows) != self.layers or min(self.windows) < 0):
            what = f"{list(self.windows)} are not the windows of {self.layers} layers"
            raise _error("windows", what, "give one for each layer, 0 for none; or none at all")
        if not 0 <= self.dense_layers < (self.layers if self.experts else 1):
            what = f"{self.dense_layers} of {self.layers} layers cannot be the dense ones of this model"
            raise _error("dense_layers", what, "leave a layer to the mixture; use 0 without one")

    def _check_rotary(self) -> None:
        name, width = ("head_dim", self.head_dim) if self.rotary_dim is None else ("rotary_dim", self.rotary_dim)
        if width % 2:
            raise _error(name, f"{width} is odd", "rotary embedding needs an even width")
        if not 0 < width <= self.head_dim:
            raise _error(name, f"{width} of {self.head_dim} dimensions", "use 2 to model.head_dim")
        if self.rope_scaling is not None and self.rope_scaling.kind is RopeKind.DYNAMIC and width < 4:
            raise _error("rope_scaling.kind", "dynamic needs two frequencies", "use a wider rotary_dim")

    def _check_latent(self, mla: MlaConfig) -> None:
        if self.head_dim != mla.nope_dim + mla.rope_dim:
            what = f"{self.head_dim} is not {mla.nope_dim} + {mla.rope_dim}"
            raise _error("head_dim", what, "use mla.nope_dim + mla.rope_dim")
        wrong = {
            "kv_heads": self.kv_heads != self.heads, "rotary_dim": self.rotary_dim is not None,
            "qk_norm": self.qk_norm is not QkNorm.NONE, "qkv_clip": self.qkv_clip is not None,
        }  # fmt: skip
        for name in (name for name, bad in wrong.items() if bad):
            remedy = "use model.heads" if name == "kv_heads" else "leave it out, or mla"
            raise _error(name, f"{getattr(self, name)} does not go with latent attention", remedy)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `from_dict`."""
        return dataclasses.asdict(self) | {"windows": list(self.windows)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Builds a config from plain values; an unknown field is a UserError that names it."""
        values = dict(values)
        for name, part in (("experts", ExpertsConfig), ("rope_scaling", RopeScaling), ("mla", MlaConfig)):
            if values.get(name):
                values[name] = _build(part, dict(values[name]), f"model.{name}")
        return _build(cls, values, "model")

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def _error(field: str, what: str, remedy: str) -> UserError:
    return UserError(what, where=f"model.{field}", remedy=remedy)


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError("no such field", where=f"{where}.{unknown[0]}", remedy=f"the fields are {sorted(known)}")
    try:
        return cls(**values)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(str(error), where=where, remedy=f"the fields are {sorted(known)}") from error


class Dispatch(enum.StrEnum):
    """What travels along the mesh's expert axis, so that tokens and experts meet. No token is dropped."""

    WEIGHTS = "weights"  # the weights of all experts come to the tokens: bytes do not grow with the batch
    TOKENS = "tokens"  # a gather of tokens and a scatter of outputs: bytes do not grow with the experts
    EXCHANGE = "exchange"  # each token to the devices of its experts: bytes do not grow with the devices


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model is computed, not what it computes: nothing here changes a result beyond rounding (in 8 bits, if asked).

    Attributes:
      remat: what the backward pass recomputes, a value of Remat.
      scan_unroll: layers per iteration of the scan over layers; 0 unrolls them all.
      attention: back end of attention, see `attention_ops.AttentionBackend`.
      experts: back end of the grouped matmul, see `kernels.grouped_matmul.Backend`.
      routing: back end of the choice of experts and of the sort by expert, see `kernels.routing.Backend`.
      dispatch: a value of Dispatch.
      expert_buffer: with Dispatch.TOKENS and EXCHANGE, rows that a device works on at once, over those of even routing.
        What is beyond is done in further passes, with work done twice.
      scatter_stage: devices among which a gradient (of experts, of attention, of an MLP, of the vocabulary) is scattered at
        a time, see `mesh_axes.gathered`; 0 for all that hold a part.
      platform: what "auto" chooses for ("cpu", "tpu", "gpu"); None for plain XLA.
      quantization: of dense projections while training, see `models.quantization`; a value of Quantization.
      quantize_gradients: whether the gradients of their inputs are computed so too.
    """

    remat: str = "none"
    scan_unroll: int = 1
    attention: str = "auto"
    experts: str = "auto"
    routing: str = "auto"
    dispatch: str = Dispatch.WEIGHTS
    expert_buffer: float = 1.5
    scatter_stage: int = 0
    platform: str | None = None
    quantization: str = Quantization.NONE
    quantize_gradients: bool = False

    def __post_init__(self):
        choices: dict[str, Iterable[str]] = {
            "remat": Remat,
            "dispatch": Dispatch,
            "attention": AttentionBackend,
            "experts": grouped_matmul.Backend,
            "routing": routing.Backend,
            "quantization": Quantization,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in list(allowed):
                remedy = f"use {', '.join(allowed)}"
                raise UserError(f"no choice {getattr(self, name)!r}", where=f"runtime.{name}", remedy=remedy)
        for name, needed in (
            ("experts", grouped_matmul.PLATFORMS.get(grouped_matmul.Backend(self.experts))),
            ("routing", routing.PLATFORMS.get(routing.Backend(self.routing))),
        ):
            if self.platform is not None and needed not in (None, self.platform):
                what = f"{getattr(self, name)!r} runs on {needed} alone, this is {self.platform}"
                raise UserError(what, where=f"runtime.{name}", remedy="use auto")
        object.__setattr__(self, "remat", Remat(self.remat))
        object.__setattr__(self, "dispatch", Dispatch(self.dispatch))
        object.__setattr__(self, "quantization", Quantization(self.quantization))
        check_installed(Quantization(self.quantization), "runtime.quantization")
        if not 1.0 <= self.expert_buffer < math.inf:
            raise UserError(f"{self.expert_buffer}", where="runtime.expert_buffer", remedy="use 1 or more")
        if self.scatter_stage < 0:
            raise UserError(
                f"{self.scatter_stage} devices", where="runtime.scatter_stage", remedy="use 0, or 2 or more"
            )
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
