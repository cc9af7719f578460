"""Worker of `benchmarks.moe_layer`: transformers' Mixtral block on PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.moe_layer_jax import arrays
from benchmarks.train_step_huggingface import EXPERT_IMPLEMENTATIONS

if TYPE_CHECKING:
    from benchmarks.moe_layer import LayerShape


def build(implementation: str, shape: LayerShape, threads: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    """A function that runs one pass of the fastest variant, and its name."""
    import torch

    torch.set_num_threads(threads)
    variants, seconds = {}, {}
    for name in EXPERT_IMPLEMENTATIONS:
        variants[name] = _variant(shape, name)
        try:
            variants[name]()
            seconds[name] = min(_seconds(variants[name]) for _ in range(3))
        except (RuntimeError, NotImplementedError, ValueError):
            continue  # an implementation that this machine does not offer
    best = min(seconds, key=lambda name: seconds[name])
    return variants[best], {"variant": best}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _variant(shape: LayerShape, experts_implementation: str) -> Callable[[], Any]:
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=shape.model_dim, intermediate_size=shape.mlp_dim, num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
    )  # fmt: skip
    config._experts_implementation = experts_implementation
    block = MixtralSparseMoeBlock(config).train()
    x_MD, router_DE, gate_EDF, up_EDF, down_EFD, dy_MD = (torch.from_numpy(array) for array in arrays(shape))
    with torch.no_grad():
        block.gate.weight.copy_(router_DE.T)
        block.experts.gate_up_proj.copy_(torch.cat([gate_EDF, up_EDF], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(down_EFD.transpose(1, 2))
    x_1MD = x_MD[None].requires_grad_()

    def run() -> Any:
        block.zero_grad(set_to_none=True)
        x_1MD.grad = None
        y_1MD = block(x_1MD)
        y_1MD.backward(dy_MD[None])
        return y_1MD, x_1MD.grad, block

    return run
