"""Writes slice by slice and reads onto a mesh of all devices; prints as JSON where the bits ended up."""

import json
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax import checkpoints


def main() -> None:
    values = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    mesh = jax.make_mesh((4,), ("x",))
    place = NamedSharding(mesh, PartitionSpec("x"))
    with tempfile.TemporaryDirectory() as folder:
        step = checkpoints.PartialStep(folder, 1, {"a": checkpoints.Spec((8, 3), values.dtype, layered=True)}, "work")
        for layer in range(8):
            step.write("a", values[layer : layer + 1], layer)
        step.finish({})
        abstract = {"a": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=place)}
        got = checkpoints.read_params(folder, abstract)["a"]
    shards = got.addressable_shards
    same = got.sharding == place and np.asarray(got).tobytes() == values.tobytes()
    print(json.dumps({"same_bits": same, "shard": shards[0].data.shape, "devices": len({s.device for s in shards})}))


if __name__ == "__main__":
    main()
