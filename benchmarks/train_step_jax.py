"""Worker of `benchmarks.train_step`: one train step of this codebase, timed on request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.train_step_shapes import StepShape


def build(shape: StepShape, threads: int) -> tuple[Callable[[int], float], dict[str, Any]]:
    """Builds the step that `experiments.pretrain` runs: same loss, optimizer and jit.

    Args:
        shape: sizes of model and batch.
        threads: CPU threads; XLA takes those that the process may use, so this is a description only.

    Returns:
        A function that runs k steps and returns their seconds, and a description (loss after the first step).
    """
    import jax
    import jax.numpy as jnp

    from kwaicoder_jax import models
    from kwaicoder_jax.training.losses import BalanceConfig, language_model_loss
    from kwaicoder_jax.training.optimizer import OptimizerConfig, make_optimizer
    from kwaicoder_jax.training.state import TrainState
    from kwaicoder_jax.training.step import make_step

    config = model_config(shape)
    runtime, balance = models.Runtime(scan_unroll=0), BalanceConfig(load=0.0, z=0.0)  # as in configs/demo.py

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return language_model_loss(trainable["model"], config, batch, runtime=runtime, balance=balance)

    def rate(step: Any) -> Any:
        return jnp.full_like(step, 1e-3, dtype=jnp.float32)

    optimizer = make_optimizer(OptimizerConfig(), rate, config)
    trainable = {"model": models.init(config, jax.random.key(0))}
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
    step = make_step(loss, optimizer, rate)
    batch = random_batch(shape)

    def steps(count: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch, None)
            metrics["loss"].block_until_ready()
        return time.perf_counter() - start

    steps(2)
    return steps, {"variant": f"{threads} threads"}


def model_config(shape: StepShape) -> Any:
    """The ModelConfig of a shape."""
    from kwaicoder_jax import models

    experts = None
    if shape.experts:
        experts = models.ExpertsConfig(shape.experts, shape.experts_per_token, shape.mlp_dim)
    return models.ModelConfig(
        vocab_size=shape.vocab_size,
        layers=shape.layers,
        model_dim=shape.model_dim,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        mlp_dim=shape.mlp_dim,
        tie_embeddings=False,
        experts=experts,
    )


def random_batch(shape: StepShape) -> dict[str, Any]:
    """One packed document per row: random tokens, every position in the loss."""
    import jax
    import jax.numpy as jnp

    tokens_BT = jax.random.randint(jax.random.key(1), (shape.batch, shape.sequence + 1), 0, shape.vocab_size)
    positions_BT = jnp.tile(jnp.arange(shape.sequence, dtype=jnp.int32).reshape(1, -1), (shape.batch, 1))
    return {
        "inputs": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "positions": positions_BT,
        "segment_ids": jnp.ones_like(positions_BT),
        "loss_mask": jnp.ones(positions_BT.shape, jnp.float32),
    }
