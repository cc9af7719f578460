"""llama.cpp's GGUF files: config, tensors (dequantised row by row) and tokenizer out of one file. Needs the gguf package.

Models of the "llama" architecture keep the rows of queries and keys in pairs (0, 1), (2, 3), ... of the rotary embedding,
where Hugging Face and we keep the two of a pair half a head apart; those of the Qwen architectures do not.
"""

import dataclasses
import hashlib
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from kwaicoder_jax import data
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import gguf_tokenizer
from kwaicoder_jax.huggingface.families import FAMILIES, Family
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.huggingface.rules import Rule
from kwaicoder_jax.huggingface.weights import Weight, Weights
from kwaicoder_jax.models import ExpertsConfig, ModelConfig, QkNorm, RopeScaling

LAYER = "blk.{layer}."
_SAMPLE = 2**16


def _rules(paired: bool) -> dict[str, Rule]:
    """Where parameters lie; `paired` for queries and keys in rotary pairs."""
    pairs = 0 if paired else None
    return {
        "embedding": Rule("token_embd.weight", "V D -> V D"),
        "head": Rule("output.weight", "V D -> V D"),
        "final_norm/scale": Rule("output_norm.weight", "D -> D"),
        "attention_norm/scale": Rule("attn_norm.weight", "D -> D"),
        "attention/query": Rule("attn_q.weight", "(H N) D -> D H N", pairs),
        "attention/query_bias": Rule("attn_q.bias", "(H N) -> H N", pairs),
        "attention/key": Rule("attn_k.weight", "(K N) D -> D K N", pairs),
        "attention/key_bias": Rule("attn_k.bias", "(K N) -> K N", pairs),
        "attention/value": Rule("attn_v.weight", "(K N) D -> D K N"),
        "attention/value_bias": Rule("attn_v.bias", "(K N) -> K N"),
        "attention/query_norm/scale": Rule("attn_q_norm.weight", "N -> N"),
        "attention/key_norm/scale": Rule("attn_k_norm.weight", "N -> N"),
        "attention/out": Rule("attn_output.weight", "D (H N) -> H N D"),
        "attention/out_bias": Rule("attn_output.bias", "D -> D"),
        "mlp_norm/scale": Rule("ffn_norm.weight", "D -> D"),
        "mlp/gate": Rule("ffn_gate.weight", "F D -> D F"),
        "mlp/up": Rule("ffn_up.weight", "F D -> D F"),
        "mlp/down": Rule("ffn_down.weight", "D F -> F D"),
        "moe/router": Rule("ffn_gate_inp.weight", "E D -> D E"),
        "moe/gate": Rule("ffn_gate_exps.weight", "E F D -> E D F"),
        "moe/up": Rule("ffn_up_exps.weight", "E F D -> E D F"),
        "moe/down": Rule("ffn_down_exps.weight", "E D F -> E F D"),
    }


_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # to the family of transformers


@dataclasses.dataclass(frozen=True)
class Opened:
    """One GGUF file.

    Attributes:
      family: the family of transformers that the model is of.
      config: of the model.
      rules: where its parameters are.
      weights: its tensors.
      token_ids: bos_token_id and the like.
      metadata: what the file says.
    """

    family: Family
    config: ModelConfig
    rules: Mapping[str, Rule]
    weights: Weights
    token_ids: Mapping[str, int]
    metadata: Fields

    def tokenizer(self) -> data.Tokenizer:
        """The tokenizer in the file; UserError for a kind that cannot be rebuilt."""
        return gguf_tokenizer.build(self.metadata)

    def companions(self) -> dict[str, str]:
        """Files that belong to the tokenizer, by name."""
        return gguf_tokenizer.companions(self.metadata)


def open_file(file: pathlib.Path) -> Opened:
    """Reads the head of a GGUF file; UserError for what is damaged or not represented."""
    reader = _reader(file)
    try:
        values = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: _weight(tensor) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error
    metadata = Fields(values, str(file))
    digest = hashlib.sha256(str(file.stat().st_size).encode())
    with open(file, "rb") as stream:
        for place in (0, file.stat().st_size // 2, max(0, file.stat().st_size - _SAMPLE)):
            stream.seek(place)
            digest.update(stream.read(_SAMPLE))
    digest.update(repr([(name, weight.shape, weight.stored) for name, weight in tensors.items()]).encode())
    weights = Weights(tensors, str(file), digest.hexdigest()[:16])
    architecture = metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        what = f"there is no architecture {architecture!r} here"
        raise metadata.error(
            "general.architecture", what, f"only {', '.join(_ARCHITECTURES)} can be imported from GGUF"
        )
    config = _config(metadata, architecture, weights)
    family = FAMILIES["mixtral" if config.experts else _ARCHITECTURES[architecture]]
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    token_ids = {f"{name}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in ids.items()}
    found = {name: int(value) for name, value in token_ids.items() if value is not None}
    return Opened(family, config, _rules(architecture == "llama"), weights, found, metadata)


def _reader(file: pathlib.Path) -> Any:
    try:
        package = importlib.import_module("gguf")
    except ImportError:
        remedy = "python -m pip install 'kwaicoder_jax[gguf]'"
        raise UserError("needs the package gguf, which is not installed", where=str(file), remedy=remedy) from None
    try:
        return package.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: pathlib.Path, error: Exception) -> UserError:
    what = f"cannot be read as GGUF, it may be cut off ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return UserError(what, where=str(file), remedy="fetch it again")


def _weight(tensor: Any) -> Weight:
    """A tensor whose rows are dequantised, to float32, when they are read."""
    quants = importlib.import_module("gguf.quants")
    shape, stored = tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name
    known = stored in ("F32", "F16") or tensor.tensor_type in quants._type_traits

    def rows(start: int, stop: int) -> np.ndarray:
        part = tensor.data[start:stop]
        return np.asarray(quants.dequantize(part, tensor.tensor_type)).reshape(stop - start, *shape[1:])

    return Weight(shape, np.dtype(np.float32 if known else np.uint8), stored, rows)


def _config(metadata: Fields, architecture: str, weights: Weights) -> ModelConfig:
    def key(name: str) -> str:
        return f"{architecture}.{name}"

    if "rope_freqs.weight" in weights:
        what = "scales rotary frequencies one by one (Llama 3.1), which GGUF keeps without the numbers behind them"
        raise UserError(what, where=weights.file_of("rope_freqs.weight"), remedy="import the model's safetensors")
    if "token_embd.weight" not in weights:
        raise UserError("is missing", where=weights.file_of("token_embd.weight"), remedy="fetch the file again")
    heads, width = metadata.size(key("attention.head_count")), metadata.size(key("embedding_length"))
    head_dim = metadata.size(key("attention.key_length"), width // heads)
    metadata.only(key("attention.value_length"), head_dim, why="values are as wide as keys")
    metadata.only(key("rope.dimension_count"), head_dim, why="all dimensions of a head turn")
    metadata.only(key("attention.sliding_window"), 0, why="windows are not read from GGUF")
    experts, mlp_dim = None, metadata.size(key("feed_forward_length"))
    if metadata.get(key("expert_count"), 0):
        experts = ExpertsConfig(metadata.size(key("expert_count")), metadata.size(key("expert_used_count")), mlp_dim)
    epsilon = np.float32(metadata.number(key("attention.layer_norm_rms_epsilon")))
    return ModelConfig(
        vocab_size=weights["token_embd.weight"].shape[0], layers=metadata.size(key("block_count")), model_dim=width,
        heads=heads, kv_heads=metadata.size(key("attention.head_count_kv"), heads), head_dim=head_dim, mlp_dim=mlp_dim,
        rope_theta=metadata.number(key("rope.freq_base"), 10_000.0), rope_scaling=_scaling(metadata, key),
        norm_epsilon=float(str(epsilon)),  # it was a decimal number before it was a float32
        tie_embeddings="output.weight" not in weights, experts=experts, max_length=metadata.size(key("context_length")),
        qkv_bias="blk.0.attn_q.bias" in weights, out_bias="blk.0.attn_output.bias" in weights,
        qk_norm=QkNorm.HEAD if "blk.0.attn_q_norm.weight" in weights else QkNorm.NONE,
    )  # fmt: skip


def _scaling(metadata: Fields, key: Any) -> RopeScaling | None:
    kind = metadata.get(key("rope.scaling.type"), "none")
    if kind == "none":
        return None
    metadata.only(key("rope.scaling.type"), "linear", "yarn", why="there is no such scaling of rotary positions")
    factor = metadata.number(key("rope.scaling.factor"))
    if kind == "linear":
        return RopeScaling("linear", factor)  # type: ignore[arg-type]
    original = metadata.size(key("rope.scaling.original_context_length"))
    return RopeScaling("yarn", factor, original_length=original)  # type: ignore[arg-type]
