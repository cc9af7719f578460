"""An engine on a mesh of four devices against the shapes that `ahead` gives for it; prints JSON."""

import json
from typing import Any

import jax
import numpy as np

from experiments.training_stage import placement_of
from kwaicoder_jax import inference, models, testing, training
from kwaicoder_jax.inference import ahead
from kwaicoder_jax.training import MeshConfig

CONFIG = testing.dense_config(vocab_size=94, layers=1, heads=4, kv_heads=2, mlp_dim=44).replace(
    experts=models.ExpertsConfig(6, 2, 24)
)
RUNTIME = models.Runtime(dispatch="tokens")
CASES = {"float": MeshConfig(data=1, fsdp=2, expert=2), "int8": MeshConfig(data=2, tensor=2)}
LENGTH, NEW, ROWS = 40, 8, 8


def differences(real: Any, shapes: Any) -> list[str]:
    """Arrays that are not of the shape, dtype and sharding that was told."""
    told, found = jax.tree.leaves_with_path(shapes), jax.tree.leaves(real)
    assert len(told) == len(found)
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in zip(told, found)
        if (x.shape, x.dtype) != (y.shape, y.dtype) or not y.sharding.is_equivalent_to(x.sharding, x.ndim)
    ]


def main() -> None:
    result = {}
    for form, mesh_config in CASES.items():
        mesh = training.make_mesh(mesh_config)
        placement = placement_of(mesh)
        params = jax.device_put(testing.random_params(CONFIG), training.param_shardings(CONFIG, mesh))
        weights = inference.prepare(params, CONFIG, form)
        engine = inference.Engine(
            weights, CONFIG, max_rows=ROWS, max_tokens=LENGTH + NEW, fixed_rows=True, runtime=RUNTIME,
            placement=placement,
        )  # fmt: skip
        prompt = tuple(np.random.default_rng(0).integers(0, 94, LENGTH).tolist())
        engine.submit(inference.Request(prompt, NEW))
        engine.step()
        load = ahead.Load.of(CONFIG, ROWS, LENGTH + NEW, LENGTH, placement)
        abstract = training.abstract_params(CONFIG, mesh)
        calls = ahead.calls(abstract, CONFIG, load, form=form, runtime=RUNTIME, placement=placement)
        told = calls["decode"].arguments
        prefix = engine._kept[prompt][0]
        real = engine._programs.decode.lower(weights=weights, rows=engine._rows, top=None)
        result[form] = {
            "differences": [
                *differences(weights, told["weights"]), *differences(engine._rows, told["rows"]),
                *differences(prefix, calls["prefill"].arguments["prefix"]),
            ],
            "same_program": calls["decode"].lower().as_text() == real.as_text(),
        }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
