"""One train step on several meshes, held against one device; prints the largest relative errors as JSON."""

import json
from typing import Any

import jax
import numpy as np
import optax

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.models import vocabulary_sharding
from kwaicoder_jax.training import MeshConfig

# The vocabulary's gradient in three slices, the last one filled up.
vocabulary_sharding.SCATTERED_ELEMENTS, vocabulary_sharding.SCATTERED_ROWS = 1024, 16

# Every size can be shared by two, and no two are equal (6 experts, 2 of them per token).
DENSE = testing.dense_config(vocab_size=94, layers=1, heads=4, kv_heads=2, mlp_dim=44)
MOE = DENSE.replace(experts=models.ExpertsConfig(6, 2, 24))
MESHES = {
    "dense": [
        MeshConfig(data=4), MeshConfig(data=2, fsdp=2), MeshConfig(tensor=2), MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    ],
    "moe": [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, expert=2, context=2)],
    "tokens": [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, fsdp=4, expert=2)],
    "exchange": [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, expert=2, context=2)],
}  # fmt: skip
RUNTIMES = {
    str(dispatch): models.Runtime(dispatch=dispatch, expert_buffer=1.0, scatter_stage=2, remat=models.Remat.PROJECTIONS)
    for dispatch in (models.Dispatch.TOKENS, models.Dispatch.EXCHANGE)
}


def devices_of(mesh: MeshConfig) -> int:
    return max(1, mesh.data) * mesh.fsdp * mesh.expert * mesh.tensor * mesh.context


def step_on(
    config: models.ModelConfig, mesh_config: MeshConfig, runtime: models.Runtime | None = None, *,
    params: Any = None, balance: training.BalanceConfig | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Metrics and gradients of one step; the momentum that the optimizer starts to keep is the gradient itself."""
    mesh = training.make_mesh(mesh_config, jax.devices()[: devices_of(mesh_config)])
    optimizer = optax.chain(optax.trace(decay=0.9), optax.scale(-0.1))

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        return training.language_model_loss(
            trainable["model"], config, batch, runtime=runtime or models.Runtime(),
            balance=balance or training.BalanceConfig(),
        )  # fmt: skip

    trainable = {"model": params or testing.random_params(config)}
    shardings = training.state_shardings(trainable, optimizer, config, mesh)
    state = jax.device_put(training.make_state(trainable, optimizer), shardings)
    batch = training.shard_batch(testing.random_batch(config, 8, 16), mesh)
    step = training.make_step(loss, optimizer, lambda step: step * 0.0 + 0.1, shardings)
    state, metrics = step(state, batch, {})
    for array, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(place, array.ndim)
    gradients = models.flatten(state.opt_state[0].trace["model"])
    metrics = jax.device_get(metrics)
    assert not metrics.pop("skipped")
    return metrics, jax.device_get(gradients)


def worst(got: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference over each array's largest entry."""
    errors = {k: np.max(np.abs(got[k] - expected[k])) / np.max(np.abs(expected[k])) for k in expected}
    return float(max(errors.values()))


def shards(config: models.ModelConfig) -> dict[str, list[int]]:
    """By parameter, the shape of one device's share on the mesh that uses every axis."""
    mesh = training.make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    places = models.flatten(training.param_shardings(config, mesh))
    return {name: places[name].shard_shape(d.shape) for name, d in models.declarations(config).items()}


def main() -> None:
    result: dict[str, Any] = {"shards": {"dense": shards(DENSE), "moe": shards(MOE)}, "errors": {}}
    for kind, config in (("dense", DENSE), ("moe", MOE), ("tokens", MOE), ("exchange", MOE)):
        if kind not in RUNTIMES:
            one = step_on(config, MeshConfig(data=1))
        for mesh in MESHES[kind]:
            other = step_on(config, mesh, RUNTIMES.get(kind))
            result["errors"][f"{kind} {mesh}"] = [worst(a, b) for a, b in zip(other, one)]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
