"""Saves large arrays from a mesh and reads them tensor by tensor; prints as JSON how they are cut."""

import contextlib
import json
import tempfile

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax import checkpoints
from kwaicoder_jax.checkpoints import layout


def main() -> None:
    layout.CHUNK_BYTES = 48
    rng = np.random.default_rng(0)
    shapes = {"embedding": (32, 3), "layers/a": (3, 8, 5), "prime": (29, 3)}
    axes = {"embedding": ("x",), "layers/a": (None, "x"), "prime": ()}
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    mesh = jax.make_mesh((4,), ("x",))
    placed = {
        name: jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes[name]))) for name, value in values.items()
    }
    tree = {"embedding": placed["embedding"], "layers": {"a": placed["layers/a"]}, "prime": placed["prime"]}
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(checkpoints.CheckpointStore(folder)) as store:
            store.save(1, tree, {"model": {}, "lineage": [], "identity": "x"})
        opened = checkpoints.open_tensors(folder)
        same = all(opened[name].read().tobytes() == value.tobytes() for name, value in values.items())
        chunks = {name: tuple(tensor._array.chunk_layout.read_chunk.shape) for name, tensor in opened.items()}
    print(json.dumps({"same_bits": same, "chunks": chunks}))


if __name__ == "__main__":
    main()
