"""Worker of `benchmarks.train_step`: one Hugging Face train step on PyTorch, timed on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.train_step_shapes import StepShape

#: Expert implementations of transformers 5 that are tried; the fastest is measured. "batched_mm" is left out: it copies
#: one expert's weights for every row (0.77 MB times 8192 rows here), which does not fit in an ordinary memory.
EXPERT_IMPLEMENTATIONS = ("eager", "grouped_mm")


def build(shape: StepShape, threads: int) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Builds the fastest variant of the Hugging Face step.

    Args:
        shape: sizes of model and batch.
        threads: CPU threads that PyTorch may use.

    Returns:
        A function that runs k steps and returns their seconds, and a description of the variant (loss, choices).
    """
    import torch

    torch.set_num_threads(threads)
    names = EXPERT_IMPLEMENTATIONS if shape.experts else ("",)
    variants: dict[tuple[str, str], Callable[[int], float]] = {}
    for experts in names:
        for adamw in ("fused", "foreach"):
            variants[experts, adamw] = _variant(shape, experts, adamw)
    seconds = {}
    for key, step in variants.items():
        try:
            step(1)
            seconds[key] = min(step(1), step(1))
        except (RuntimeError, NotImplementedError, ValueError):
            continue  # an implementation that this machine does not offer
    best = min(seconds, key=lambda key: seconds[key])
    tried = {"/".join(filter(None, key)): round(value, 3) for key, value in seconds.items()}
    return variants[best], {"variant": "/".join(filter(None, best)), "tried_seconds": tried}


def _model(shape: StepShape, experts_implementation: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.model_dim,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.mlp_dim,
        "max_position_embeddings": shape.sequence,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if not shape.experts:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    config = MixtralConfig(
        **sizes,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
    )
    config._experts_implementation = experts_implementation
    return MixtralForCausalLM(config)


def _variant(shape: StepShape, experts_implementation: str, adamw: str) -> Callable[[int], float]:
    import torch

    state: dict[str, Any] = {}

    def prepare() -> None:
        torch.manual_seed(0)
        model = _model(shape, experts_implementation).train()
        state["model"] = model
        state["optimizer"] = torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **{adamw: True}
        )
        state["tokens"] = torch.randint(0, shape.vocab_size, (shape.batch, shape.sequence))

    def steps(count: int) -> float:
        if not state:
            prepare()
        model, optimizer, tokens = state["model"], state["optimizer"], state["tokens"]
        start = time.perf_counter()
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
        return time.perf_counter() - start

    return steps
