"""The balanced order of tokens: written out, and there and back over devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwaicoder_jax.models import context_order
from tests.kwaicoder_jax.training import devices

AXES = ("data", "fsdp", "expert", "tensor", "context")


def test_first_and_last_chunks_lie_together():
    assert context_order.order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert context_order.order(6, 3).tolist() == [0, 5, 1, 4, 2, 3]
    assert context_order.order(4, 1).tolist() == [0, 1, 2, 3]


def test_positions_are_shared_evenly():
    for shards in (1, 2, 5, 8):
        sums = context_order.order(20 * shards, shards).reshape(shards, -1).sum(1)
        assert len(set(sums.tolist())) == 1


def test_without_a_mesh_nothing_is_shared():
    assert context_order.shards(jnp.zeros((4, 8))) == 1


def test_there_and_back_over_devices():
    assert devices.run("models.test_context_order", 8) == [2, 4, 8, 1, 1]


def main() -> None:
    """Prints by mesh how many devices share the time: the sizes of the axis, 1 for rows or a time that they cannot."""
    shared = []
    for context, rows, time in ((2, 8, 16), (4, 8, 16), (8, 8, 16), (4, 8, 12), (2, 3, 16)):
        mesh = Mesh(np.array(jax.devices()).reshape(8 // context, 1, 1, 1, context), AXES)
        x_BTD = np.arange(rows * time * 3, dtype=np.int32).reshape(rows, time, 3)
        whole = jax.device_put(x_BTD, NamedSharding(mesh, PartitionSpec()))
        found: list[int] = []

        def run(x_BTD, found=found):
            found.append(context_order.shards(x_BTD))
            if found[0] == 1:
                return x_BTD, x_BTD
            there = context_order.balanced(x_BTD)
            return there, context_order.restored(there)

        there, back = jax.jit(run)(whole)
        np.testing.assert_array_equal(back, x_BTD)
        np.testing.assert_array_equal(there, x_BTD[:, context_order.order(time, found[0])])
        np.testing.assert_array_equal(context_order.in_time(there, found[0]), x_BTD)
        shared.append(found[0])
    print(json.dumps(shared))


if __name__ == "__main__":
    main()
