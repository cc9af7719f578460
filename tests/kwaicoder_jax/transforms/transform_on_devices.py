"""Transforms under jit on a mesh of 8 devices; prints the largest array of each compiled program and whether bits agree."""

import json
import math
import re
import sys

import jax
import numpy as np

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.transforms import Target, fold, optimizer_state, prune, upcycle
from tests.kwaicoder_jax.transforms import upcycling

DENSE = testing.dense_config(layers=4, model_dim=64, mlp_dim=192, heads=8, kv_heads=4, head_dim=16, vocab_size=128)
MESHES = {
    "fsdp": training.MeshConfig(data=1, fsdp=8),
    "mixed": training.MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "tensor": training.MeshConfig(data=1, tensor=4, fsdp=2),
}


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast")


def largest_arrays(text: str) -> dict[str, int]:
    """By operation, the elements of the largest array that it makes on one device."""
    found: dict[str, int] = {}
    for shapes, operation in re.findall(r"= (\(.*?\)|\S+) ([\w-]+)\(", text):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            size = math.prod(int(n) for n in dims.split(",") if n)
            found[operation] = max(found.get(operation, 0), size)
    return found


def transforms():
    """By name: config before, record, and the function of parameters."""
    scores = upcycling.scores_of(DENSE)
    target = Target(layers=3, model_dim=32, mlp_dim=96, heads=4, kv_heads=4)
    yield "prune", DENSE, prune.plan(DENSE, scores, target), prune.replay
    for partition in ("contiguous", "random_per_replica"):
        record = upcycle.plan(DENSE, granularity=4, replicas=4, partition=partition)
        yield f"upcycle {partition}", DENSE, record, upcycle.replay
    shared = upcycle.plan(DENSE, granularity=4, replicas=4, shared_neurons=64, scores=scores)
    yield "upcycle shared", DENSE, shared, upcycle.replay
    moment = lambda params, config, record: (optimizer_state.upcycled(params, params, config, record)[0], None)  # noqa: E731
    yield "moments", DENSE, upcycle.plan(DENSE, granularity=4, replicas=4), moment
    record = upcycle.plan(DENSE, granularity=4, replicas=4)
    yield "fold", models.ModelConfig.from_dict(record["config_after"]), fold.plan(record), fold.replay


def main() -> None:
    report = {}
    for label, mesh_config in MESHES.items():
        mesh = training.make_mesh(mesh_config)
        for name, config, record, function in transforms():
            if len(sys.argv) > 1 and sys.argv[1] not in name:
                continue
            after = models.ModelConfig.from_dict(record["config_after"])
            params = testing.random_params(config)
            sharded = jax.device_put(params, training.param_shardings(config, mesh))
            work = jax.jit(
                lambda p, function=function, config=config, record=record: function(p, config, record)[0],
                out_shardings=training.param_shardings(after, mesh),
            )
            compiled = work.lower(sharded).compile()
            result = compiled(sharded)
            expected = function(jax.tree.map(np.asarray, params), config, record)[0]
            sizes = {n: [math.prod(d.shape) for d in models.declarations(c).values() if "layers" in d.axes]
                     for n, c in (("before", config), ("after", after))}  # fmt: skip
            largest = largest_arrays(compiled.as_text())
            report[f"{label} {name}"] = {
                "same": all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected))),
                "before": max(sizes["before"]),
                "after": max(sizes["after"]),
                "array": max(
                    n for operation, n in largest.items() if operation not in ("parameter", "constant", "tuple")
                ),
                "collective": max(
                    [n for operation, n in largest.items() if operation.startswith(COLLECTIVES)], default=0
                ),
            }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
