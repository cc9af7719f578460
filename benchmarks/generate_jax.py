"""Worker of `benchmarks.generate`: this codebase's engine, timed on request."""

from __future__ import annotations

import time

from benchmarks.generate_shapes import GenerateShape


class Runner:
    """An engine with its defaults, fed as a server feeds it: every prompt a request of its own."""

    def __init__(self, shape: GenerateShape, variant: str, threads: int):
        """`variant` is "dtype" or "dtype/form"; XLA takes the threads that the process may use."""
        import jax
        import jax.numpy as jnp
        import numpy as np

        from kwaicoder_jax import inference, models

        del threads
        dtype, _, form = variant.partition("/")
        config = models.ModelConfig(
            vocab_size=shape.vocab_size,
            layers=shape.layers,
            model_dim=shape.model_dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            mlp_dim=shape.mlp_dim,
            rope_theta=shape.rope_theta,
            dtype=dtype,
        )
        rng = np.random.default_rng(0)
        params = jax.tree.map(
            lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) * 0.02), models.abstract(config)
        )
        self._shape, self._rng, self._inference = shape, rng, inference
        weights = inference.prepare(params, config, form or "float")
        self._engine = inference.Engine(weights, config, max_rows=8, max_tokens=4096)

    def run(self, batch: int) -> dict[str, float]:
        """Seconds of the prompts with their first tokens, and of the tokens after those."""
        shape = self._shape
        prompts = self._rng.integers(0, shape.vocab_size, (batch, shape.prompt)).tolist()
        start = time.perf_counter()
        generations = [
            self._engine.submit(self._inference.Request(tuple(prompt), shape.new_tokens)) for prompt in prompts
        ]
        while self._engine.waiting:
            self._engine.admit()
        begun = time.perf_counter()
        self._engine.run()
        end = time.perf_counter()
        assert all(len(generation.ids) == shape.new_tokens for generation in generations)
        return {"prefill": begun - start, "decode": end - begun}
