"""Sizes of the models that `benchmarks.train_step` measures."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StepShape:
    """A Llama-type model (experts = 0) or a Mixtral-type one, and its batch."""

    layers: int = 4
    model_dim: int = 256
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp_dim: int = 704
    vocab_size: int = 8192
    batch: int = 8
    sequence: int = 256
    experts: int = 0
    experts_per_token: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.sequence


#: By name. Four experts of 256 neurons per token are the MoE's active MLP: 1024 against the dense 704.
SHAPES = {
    "dense": StepShape(),
    "moe": StepShape(mlp_dim=256, experts=16, experts_per_token=4),
}
