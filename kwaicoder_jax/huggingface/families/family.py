"""What a family of models is: how its config.json reads as a ModelConfig, and where its tensors lie."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import rope
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.huggingface.rules import Rule
from kwaicoder_jax.models import ModelConfig

Rules = Mapping[str, Rule]  # by the name of our parameter: of the model, or inside a layer
LAYER = "model.layers.{layer}."
STACKS = ("dense_layers/", "layers/")  # of our layers, in their order


@dataclasses.dataclass(frozen=True)
class Filler:
    """A tensor that the family's code expects and that has no effect: zeros, written on export, not read on import."""

    theirs: str
    shape: tuple[int, ...]
    dtype: str | None = None  # None for that of the weights


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
      model_type: as in config.json.
      architecture: the class that transformers makes of it.
      read: config.json to ModelConfig; a UserError names a field whose value has no counterpart.
      write: ModelConfig to config.json, as nearly as the family can; what came of it is seen by reading it again. A
        UserError where transformers would refuse the result.
      rules: where our parameters lie.
      fillers: of one layer of the mixture.
      extra_layers: whether layers may follow that predict more tokens ahead (multi-token prediction); they are left out.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rules: Callable[[ModelConfig], Rules]
    fillers: Callable[[ModelConfig], list[Filler]] = lambda config: []
    extra_layers: bool = False


def common(fields: Fields, *, epsilon: float = 1e-6, theta: float = 10_000.0, head_dim: int | None = None) -> dict:
    """The fields of ModelConfig that every family has, from config.json.

    Args:
      fields: of config.json.
      epsilon: the family's default of rms_norm_eps.
      theta: its default of rope_theta.
      head_dim: its own width of a head; as in config.json, or hidden_size over heads, if None.
    """
    _refuse(fields)
    heads, model_dim = fields.size("num_attention_heads"), fields.size("hidden_size")
    if head_dim is None:
        if fields.get("head_dim") is None and model_dim % heads:
            raise fields.error("hidden_size", f"{model_dim} is no multiple of {heads} heads", "say head_dim")
        head_dim = fields.size("head_dim", model_dim // heads)
    max_length = fields.size("max_position_embeddings")
    return {
        "vocab_size": fields.size("vocab_size"),
        "layers": fields.size("num_hidden_layers"),
        "model_dim": model_dim,
        "heads": heads,
        "kv_heads": fields.size("num_key_value_heads", heads),
        "head_dim": head_dim,
        "mlp_dim": fields.size("intermediate_size"),
        "norm_epsilon": fields.number("rms_norm_eps", epsilon),
        "tie_embeddings": fields.flag("tie_word_embeddings"),
        "initializer_range": fields.number("initializer_range", 0.02),
        "max_length": max_length,
        **rope.read(fields, theta, max_length),
    }


def _refuse(fields: Fields) -> None:
    """What no model here has, whatever its family."""
    fields.only("hidden_act", "silu", "swish", why="the MLP is SwiGLU")
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping", "logit_scale",
                 "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"):  # fmt: skip
        fields.only(name, why="scaled or capped logits and residuals are not represented")
    if fields.get("quantization_config"):
        raise fields.error("quantization_config", "the weights are quantised", "use weights in bfloat16 or float32")


def common_fields(config: ModelConfig) -> dict[str, Any]:
    """The same fields of config.json."""
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.model_dim,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_length,
        "attention_dropout": 0.0,
        "use_cache": True,
        **rope.write(config),
    }


def divisible(config: ModelConfig) -> None:
    """What transformers asks of the family, though its models do not need it."""
    if config.model_dim % config.heads:
        what = f"{config.model_dim} is no multiple of {config.heads} heads, which transformers refuses in this family"
        raise UserError(what, where="model.model_dim")


def window(config: ModelConfig) -> int | None:
    """The window of a family that has one for all layers or for some, None without any."""
    return max(config.windows, default=0) or None


def layer_types(config: ModelConfig) -> list[str]:
    """The kind of every layer where they may differ."""
    return ["sliding_attention" if each else "full_attention" for each in config.windows or [0] * config.layers]


def read_layer_types(fields: Fields, default: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows of the Qwen families: `layer_types`, or `default` of a layer's number, where use_sliding_window is on."""
    layers = fields.size("num_hidden_layers")
    types = fields.get("layer_types", [
        "sliding_attention" if fields.flag("use_sliding_window") and default(layer) else "full_attention"
        for layer in range(layers)
    ])  # fmt: skip
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {"sliding_attention", "full_attention"}:
        raise fields.error("layer_types", f"{types!r} is not sliding_attention or full_attention for every layer")
    if "sliding_attention" not in types:
        return ()
    if not fields.flag("use_sliding_window"):
        raise fields.error("layer_types", "some slide, but use_sliding_window is off", "let them agree")
    width = fields.size("sliding_window", 4096)
    return tuple(width if each == "sliding_attention" else 0 for each in types)
