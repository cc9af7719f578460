"""The model and the requests that `benchmarks.generate` measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class GenerateShape:
    """A Llama-type model with tied embeddings, and what is asked of it."""

    layers: int = 30
    model_dim: int = 576
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    mlp_dim: int = 1536
    vocab_size: int = 49152
    rope_theta: float = 1e5
    prompt: int = 128
    new_tokens: int = 64


#: By name. SmolLM2-135M's sizes with random weights: speed does not depend on what the numbers are.
SHAPES = {
    "smollm2_135m": GenerateShape(),
    "tiny": GenerateShape(2, 48, 3, 1, 16, 96, 256, prompt=8, new_tokens=48),
}
