"""Scores with parameters and batches spread over meshes of 8 devices, held against one device; prints JSON."""

import dataclasses
import json

import jax
import numpy as np

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.training import MeshConfig
from kwaicoder_jax.transforms import importance

# Every size can be shared by two, and no two are equal.
DENSE = testing.dense_config(vocab_size=94, layers=2, heads=4, kv_heads=2, mlp_dim=44)
MOE = DENSE.replace(experts=models.ExpertsConfig(6, 2, 24, shared_mlp_dim=10))
MESHES = {
    "dense": [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=4, fsdp=2)],
    "moe": [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=2, expert=2, context=2)],
}


def on(config, mesh_config):
    """Scores and losses without a layer, on a mesh of the first devices, or on one device if that is None."""
    params, batches = testing.random_params(config), [testing.random_batch(config, 8, 16, seed) for seed in (0, 1)]
    batches[0]["segment_ids"][3] = batches[0]["loss_mask"][3] = 0  # what padding becomes is up to the back end
    if mesh_config is not None:
        mesh = training.make_mesh(mesh_config, jax.devices())
        params = jax.device_put(params, training.param_shardings(config, mesh))
        batches = [training.shard_batch(batch, mesh) for batch in batches]
        assert len(batches[0]["inputs"].sharding.device_set) == 8
    scores = importance.collect(params, config, batches, blocks=True, weight_aware=True)
    return scores.replace(leave_one_out_L=importance.leave_one_out(params, config, batches).loss_L)


def errors(got, expected):
    """By field, the largest difference over the largest entry."""
    found = {}
    for field in dataclasses.fields(expected):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        if isinstance(b, np.ndarray):
            found[field.name] = float(np.max(np.abs(a - b)) / np.max(np.abs(b)))
    return found


def main():
    result = {}
    for kind, config in (("dense", DENSE), ("moe", MOE)):
        one = on(config, None)
        for mesh in MESHES[kind]:
            result[f"{kind} {mesh}"] = errors(on(config, mesh), one)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
