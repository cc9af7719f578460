"""Saves step after step into the folder that is named, until it is killed; prints each step that is done."""

import sys

import jax.numpy as jnp

from kwaicoder_jax import checkpoints

META = {"model": {}, "lineage": [], "identity": "x"}


def main() -> None:
    store = checkpoints.CheckpointStore(sys.argv[1])
    step = store.latest_step() or 0
    while True:
        step += 1
        store.save(step, {"a": jnp.full(3000, step)}, {**META, "at": step}, {"step": jnp.asarray(step)})
        print(step, flush=True)


if __name__ == "__main__":
    main()
