"""Transforms under jit on a mesh of 8 devices; prints what the compiled programs move and make, and if bits agree."""

import json
import math
import re

import jax
import numpy as np

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.transforms import Target, fold, optimizer_state, parameterwise, prune, upcycle
from tests.kwaicoder_jax.transforms import masks, upcycling

DENSE = testing.dense_config(layers=4, model_dim=64, mlp_dim=192, heads=8, kv_heads=4, head_dim=16, vocab_size=128)
MIXTURE = testing.moe_config(
    layers=4, model_dim=64, heads=8, kv_heads=4, head_dim=16, vocab_size=128,
    experts=models.ExpertsConfig(16, 2, 64, shared_mlp_dim=64),
)  # fmt: skip
MESHES = {
    "fsdp": training.MeshConfig(data=1, fsdp=8),
    "mixed": training.MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    "tensor": training.MeshConfig(data=1, tensor=4, fsdp=2),
    "expert": training.MeshConfig(data=1, expert=4, tensor=2),
}
# One axis by a quarter, so that the result is as large as the source is, nearly; then together.
QUARTERS = {"model_dim": 48, "mlp_dim": 144, "layers": 3, "heads": 4}
TOGETHER = {"layers": 3, "model_dim": 32, "mlp_dim": 96, "heads": 4, "kv_heads": 4}
MIXTURE_CUTS = {"experts": 12, "expert_dim": 48, "shared_dim": 48, "model_dim": 48}
TWINS = ("value", "gate", "attention_norm/scale")  # of key, up and mlp_norm: computed alike, so compiled once

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
    """By name: config before, record, and the transform."""
    scores = upcycling.scores_of(DENSE)
    for axis, size in QUARTERS.items():
        yield f"prune {axis}", DENSE, prune.plan(DENSE, scores, Target(**{axis: size})), prune
    yield "prune together", DENSE, prune.plan(DENSE, scores, Target(**TOGETHER), head_merge=True), prune
    rng = np.random.default_rng(0)
    for axis, size in MIXTURE_CUTS.items():
        made = masks.scores_of(rng, MIXTURE, masks.draw(rng, MIXTURE, {axis: size}))
        yield f"mixture {axis}", MIXTURE, prune.plan(MIXTURE, made, Target(**{axis: size})), prune
    for partition in ("contiguous", "random_per_replica"):
        record = upcycle.plan(DENSE, granularity=4, replicas=4, partition=partition)
        yield f"upcycle {partition}", DENSE, record, upcycle
        yield f"fold {partition}", models.ModelConfig.from_dict(record["config_after"]), fold.plan(record), fold
    shared = upcycle.plan(DENSE, granularity=4, replicas=4, shared_neurons=64, scores=scores)
    yield "upcycle shared", DENSE, shared, upcycle
    yield "moments", DENSE, upcycle.plan(DENSE, granularity=4, replicas=4), optimizer_state.Moment(1)


def whole(mesh, config, record, transform) -> bool:
    """Whether the whole model's parameters, in one program, are those of numpy."""
    after = models.ModelConfig.from_dict(record["config_after"])
    params = testing.random_params(config)
    sharded = jax.device_put(params, training.param_shardings(config, mesh))
    work = jax.jit(
        lambda p: parameterwise.replay(transform, p, config, record),
        out_shardings=training.param_shardings(after, mesh),
    )
    expected = parameterwise.replay(transform, jax.tree.map(np.asarray, params), config, record)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(work(sharded)), jax.tree.leaves(expected)))


def each(mesh, config, record, transform):
    """Of every parameter that is computed, in a program of its own: its sizes, what is moved and made, and the bits."""
    flat = {name: np.asarray(x) for name, x in models.flatten(testing.random_params(config)).items()}
    before = models.flatten(training.param_shardings(config, mesh))
    after = models.flatten(training.param_shardings(models.ModelConfig.from_dict(record["config_after"]), mesh))
    for name, sharding in after.items():
        sources = transform.sources(record, name)
        if not sources or name.endswith(TWINS) or not name.startswith(("layers/", "embedding")):
            continue
        host = {source: flat[source] for source in sources}
        expected = transform.parameter(record, name, host)
        if expected is next(iter(host.values())):  # passed on
            continue
        arrays = jax.device_put(host, {source: before[source] for source in sources})
        work = jax.jit(lambda x, name=name: transform.parameter(record, name, x), out_shardings=sharding)
        compiled = work.lower(arrays).compile()
        largest = largest_arrays(compiled.as_text())
        inputs = [(x.size, math.prod(x.sharding.shard_shape(x.shape))) for x in arrays.values()]
        sizes = [*inputs, (expected.size, math.prod(sharding.shard_shape(expected.shape)))]
        yield name, {
            "same": np.array_equal(compiled(arrays), expected),
            "smallest": min(size for size, _ in sizes),
            "part": max(part for _, part in sizes),
            "array": max(n for kind, n in largest.items() if kind not in ("parameter", "constant", "tuple")),
            "collective": max([n for kind, n in largest.items() if kind.startswith(COLLECTIVES)], default=0),
        }  # fmt: skip


def main() -> None:
    report: dict[str, dict] = {"whole": {}, "each": {}}
    for label, mesh_config in MESHES.items():
        mesh = training.make_mesh(mesh_config)
        for name, config, record, transform in transforms():
            if label == "expert" and not name.startswith("mixture"):
                continue
            if label == "mixed":
                report["whole"][name] = whole(mesh, config, record, transform)
            for parameter, found in each(mesh, config, record, transform):
                report["each"][f"{label}: {name}: {parameter}"] = found
    print(json.dumps(report))


if __name__ == "__main__":
    main()
