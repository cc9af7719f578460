"""Dense families: Llama (SmolLM2, OpenCoder, DeepSeek-Coder v1), Mistral, Qwen2 (Qwen2.5-Coder), Qwen3."""

from typing import Any

from kwaicoder_jax.huggingface.families import tensors
from kwaicoder_jax.huggingface.families.family import (
    Family,
    common,
    common_fields,
    divisible,
    layer_types,
    read_layer_types,
    window,
)
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.models import ModelConfig, QkNorm


def _read_llama(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return ModelConfig(**common(fields), qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias"))


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    divisible(config)
    return common_fields(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias, "pretraining_tp": 1}


def _read_mistral(fields: Fields) -> ModelConfig:
    width = fields.size("sliding_window", 4096) if fields.values.get("sliding_window", 4096) is not None else 0
    return ModelConfig(**common(fields), windows=(width,) * fields.size("num_hidden_layers"))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return common_fields(config) | {"sliding_window": window(config)}


def sliding(config: ModelConfig) -> dict[str, Any]:
    """The fields of Qwen's windows."""
    return {
        "use_sliding_window": bool(config.windows),
        "sliding_window": window(config),
        "max_window_layers": config.layers,
        "layer_types": layer_types(config),
    }


def _windows(fields: Fields) -> tuple[int, ...]:
    return read_layer_types(fields, lambda layer: layer >= fields.size("max_window_layers", 28, least=0))


def _read_qwen2(fields: Fields) -> ModelConfig:
    return ModelConfig(**common(fields), qkv_bias=True, windows=_windows(fields))


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return common_fields(config) | sliding(config)


def _read_qwen3(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    values = common(fields, head_dim=fields.size("head_dim", 128))
    return ModelConfig(**values, qkv_bias=bias, out_bias=bias, qk_norm=QkNorm.HEAD, windows=_windows(fields))


def _write_qwen3(config: ModelConfig) -> dict[str, Any]:
    return common_fields(config) | sliding(config) | {"attention_bias": config.qkv_bias}


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, lambda config: tensors.DENSE)
MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, lambda config: tensors.DENSE)
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, lambda config: tensors.DENSE)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, lambda config: tensors.DENSE)
