"""Forward KL under jit with its batch split over all devices; prints value and gradients as JSON."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax import distillation, training
from tests.kwaicoder_jax.distillation import test_logits


def main() -> None:
    student, table, teacher, teacher_table, mask = test_logits.arrays(4, 12)
    mesh = training.make_mesh(training.MeshConfig())
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    places = (rows, everywhere, rows, everywhere, rows)
    function = jax.value_and_grad(lambda *x: distillation.forward_kl(*x, 2.0), (0, 1))
    values = jax.device_put((student, table, teacher, teacher_table, mask), places)
    value, (by_hidden, by_table) = jax.jit(function, in_shardings=places)(*values)
    found = {"value": value, "by_hidden": by_hidden, "by_table": by_table}
    result = {name: np.asarray(array).tolist() for name, array in found.items()}
    shards = {str(shard.index) for shard in by_hidden.addressable_shards}
    print(json.dumps({**result, "devices_of_hidden_gradient": len(shards)}))


if __name__ == "__main__":
    main()
