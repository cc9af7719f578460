"""The layers that are timed against each other compute the same."""

import numpy as np
import pytest

from benchmarks import moe_layer_jax, moe_layer_torch
from benchmarks.moe_layer import LayerShape

SHAPE = LayerShape(tokens=60, experts=4, experts_per_token=2, model_dim=16, mlp_dim=24)


@pytest.mark.parametrize("experts", moe_layer_torch.EXPERT_IMPLEMENTATIONS)
def test_ours_and_transformers(experts):
    pytest.importorskip("torch", reason="needs requirements-dev.txt")
    y_1MD, dx_1MD, block = moe_layer_torch._variant(SHAPE, experts)()
    gate, up = (part.mT.numpy() for part in block.experts.gate_up_proj.grad.chunk(2, dim=1))
    down, router = block.experts.down_proj.grad.mT.numpy(), block.gate.weight.grad.T.numpy()
    theirs = [y_1MD.detach()[0].numpy(), dx_1MD[0].numpy(), router, gate, up, down]
    for implementation in moe_layer_jax.BACKENDS:
        run, description = moe_layer_jax.build(implementation, SHAPE, 1)
        y_MD, gradients = run()
        for ours, wanted in zip((y_MD, *gradients), theirs, strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
        assert 1.0 <= description["executed"] <= 2.0  # 30 rows an expert on average, in tiles of 32
