"""Greedy answers on meshes of four devices against one device, and one compiled step; prints JSON."""

import json
from typing import Any

import jax
import numpy as np

from experiments.training_stage import placement_of
from kwaicoder_jax import inference, models, testing, training
from kwaicoder_jax.training import MeshConfig

# Every size can be shared by two, and no two are equal.
DENSE = testing.dense_config(vocab_size=94, layers=2, heads=4, kv_heads=2, mlp_dim=44)
MIXTURE = DENSE.replace(experts=models.ExpertsConfig(6, 2, 24))
CASES = {
    "dense": (DENSE, [MeshConfig(data=2, tensor=2), MeshConfig(data=1, fsdp=4)]),
    "mixture": (MIXTURE, [MeshConfig(data=1, fsdp=2, expert=2), MeshConfig(data=1, expert=2, tensor=2)]),
    "mixture by tokens": (MIXTURE, [MeshConfig(data=1, expert=2, tensor=2)]),
}


def answers(
    config: models.ModelConfig, params: Any, placement: Any, form: str, runtime: models.Runtime
) -> list[list[int]]:
    """Of requests that come while others run; one samples."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, config.vocab_size, length).tolist()) for length in (3, 17, 9, 30, 5)]
    weights = inference.prepare(params, config, form)
    engine = inference.Engine(
        weights, config, max_rows=4, max_tokens=128, fixed_rows=True, runtime=runtime, placement=placement
    )
    generations = [engine.submit(inference.Request(prompt, 8)) for prompt in prompts[:3]]
    for _ in range(4):
        engine.step()
    generations += [engine.submit(inference.Request(prompt, 8)) for prompt in prompts[3:]]
    generations += [engine.submit(inference.Request(prompts[0], 8, temperature=1.0, top_k=20, logprobs=2))]
    engine.run()
    if placement is not None:
        keys = engine._rows.cache.keys[0].sharding
        assert keys.is_equivalent_to(placement.caches(config.kv_heads, rows=True).keys, 4), keys
    return [generation.ids for generation in generations]


def main() -> None:
    result = {}
    for name, (config, meshes) in CASES.items():
        params = testing.random_params(config)
        runtime = models.Runtime(dispatch="tokens" if name.endswith("tokens") else "weights")
        expected = answers(config, params, None, "float", runtime)
        for mesh_config in meshes:
            mesh = training.make_mesh(mesh_config)
            sharded = jax.device_put(params, training.param_shardings(config, mesh))
            result[f"{name} {mesh_config}"] = answers(config, sharded, placement_of(mesh), "float", runtime) == expected
    print(json.dumps(result))


if __name__ == "__main__":
    main()
