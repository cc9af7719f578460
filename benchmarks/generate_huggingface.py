"""Worker of `benchmarks.generate`: transformers' `generate` on PyTorch, timed on request."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.generate_shapes import GenerateShape


class Runner:
    """A model as transformers loads it by default: sdpa attention, dynamic KV cache, all threads."""

    def __init__(self, shape: GenerateShape, variant: str, threads: int):
        """`variant` is "dtype" or "dtype/attention"."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        dtype, _, attention = variant.partition("/")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        attends: dict[str, Any] = {"attn_implementation": attention or "sdpa"}
        config = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.model_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.mlp_dim,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            **attends,
        )
        self._shape, self._torch = shape, torch
        self._model: Any = LlamaForCausalLM(config).eval().to(getattr(torch, dtype))

    def run(self, batch: int) -> dict[str, float]:
        """Seconds of the prompts with their first tokens, and of the tokens after those."""
        torch, shape = self._torch, self._shape
        inputs = torch.randint(0, shape.vocab_size, (batch, shape.prompt))
        mask = torch.ones_like(inputs)
        seconds = []
        for count in (1, shape.new_tokens):
            start = time.perf_counter()
            with torch.no_grad():
                self._model.generate(
                    inputs, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
            seconds.append(time.perf_counter() - start)
        return {"prefill": seconds[0], "decode": seconds[1] - seconds[0]}
