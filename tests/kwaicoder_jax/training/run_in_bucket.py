"""A training run in a bucket: stopped, its newest checkpoint cut off, gone on with; and a streamed checkpoint."""

import itertools
import json

import numpy as np
from etils import epath

from kwaicoder_jax import checkpoints, files, training
from kwaicoder_jax.checkpoints import layout
from tests.kwaicoder_jax.training import bucket, toy

META = {"model": {}, "lineage": [], "identity": "x"}


def same(one, other) -> bool:
    try:
        toy.assert_same_bits(one, other)
    except AssertionError:
        return False
    return True


def main() -> None:
    objects = bucket.open_bucket()
    found, folder = {}, epath.Path("gs://bucket/run/cpt")
    for name, steps in (("first", 12), ("second", 5)):
        asked = itertools.count(1)
        try:
            toy.run(folder, stop_requested=lambda asked=asked, steps=steps: next(asked) == steps)
        except training.Preempted:
            found[name] = checkpoints.newest_step(folder)
    newest = checkpoints.newest_step(folder)
    (folder / "checkpoints" / str(newest) / layout.COMMITTED).unlink()
    found["whole_before"] = checkpoints.CheckpointStore(folder / "checkpoints").latest_step()
    warnings: list[str] = []
    state, meta, _ = toy.run(folder, on_warning=warnings.append)
    found |= {
        "warnings": warnings,
        "step": meta["progress"]["step"],
        "same": same(state, toy.plain(range(1, toy.STEPS + 1))),
    }
    tensors = checkpoints.open_tensors(folder)
    found["table"] = np.array_equal(tensors["table"].read(), state.trainable["model"]["table"])

    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    step = checkpoints.PartialStep(
        files.path("gs://bucket/moe/checkpoints"), 0, {"a": layout.Spec((3, 4), array.dtype)}, "x"
    )
    step.write("a", array)
    found["seen_early"] = objects.exists("/bucket/moe/checkpoints/0")
    step.finish(META)
    found["streamed"] = checkpoints.open_tensors("gs://bucket/moe")["a"].read().tolist()
    found["left"] = [key for key in objects.store if ".partial" in key or layout.TEMPORARY in key]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
