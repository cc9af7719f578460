"""The top-K loss under jit with its batch split over all devices; prints value, gradients and what the program gathers."""

import functools
import json
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax import distillation, training
from tests.kwaicoder_jax.distillation import test_logits


def main() -> None:
    values = tuple(test_logits.arrays(4, 12))
    mesh = training.make_mesh(training.MeshConfig())
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    places = (rows, everywhere, rows, everywhere, rows)
    settings = distillation.LogitsSettings(temperature=2.0, top_k=5, shards=mesh.size)
    loss = jax.value_and_grad(functools.partial(distillation.logits_loss, settings), (0, 1))
    compiled = jax.jit(loss, in_shardings=places).lower(*values).compile()
    value, (by_hidden, by_table) = compiled(*jax.device_put(values, places))
    found = {"value": value, "by_hidden": by_hidden, "by_table": by_table}
    result = {name: np.asarray(array).tolist() for name, array in found.items()}
    text = compiled.as_text()
    shapes = re.findall(r"\w\d+\[([\d,]+)\]", text)
    largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)
    print(json.dumps({**result, "gathers": text.count("all-gather("), "largest": int(largest)}))


if __name__ == "__main__":
    main()
