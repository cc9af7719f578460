"""Saves while memory is watched, and with files that may not grow; prints as JSON what came of it."""

import contextlib
import json
import resource
import sys
import time

import jax
import numpy as np

from kwaicoder_jax import checkpoints

META = {"model": {}, "lineage": [], "identity": "x"}
ARRAYS, BYTES = 24, 12 * 2**20


def memory(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def extra_memory(folder: str) -> float:
    """The most that saves take beside the state, over the state's bytes."""
    make = jax.jit(lambda key: jax.random.normal(key, (3, 2**20)))
    state = {f"{number}": make(jax.random.key(number)) for number in range(ARRAYS)}
    jax.block_until_ready(state)
    with contextlib.closing(checkpoints.CheckpointStore(folder, asynchronous=True)) as store:
        before = memory("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the high-water mark starts anew
        for step in (1, 2):
            store.save(step, state, META)
            store.wait()
        return (memory("VmHWM") - before) / (ARRAYS * BYTES)


def tree(step: int) -> dict[str, jax.Array]:
    return {"a": jax.numpy.asarray(np.random.default_rng(step).standard_normal(2**20), np.float32)}


def failure(folder: str) -> dict[str, object]:
    """A save that cannot end, and the same again when it can."""
    result: dict[str, object] = {}
    with contextlib.closing(checkpoints.CheckpointStore(folder, asynchronous=True)) as store:
        store.save(1, tree(1), META)
        store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
        store.save(2, tree(2), META)
        try:
            for _ in range(600):
                store.check()
                time.sleep(0.1)
        except OSError as error:
            result["error"] = str(error)
        result["newest"] = store.latest_step()
        with contextlib.suppress(OSError):
            store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.save(2, tree(2), META)
        store.wait()
        result["newest_after"] = store.latest_step()
        got = store.restore(2, "params", checkpoints.on_device(jax.eval_shape(lambda: tree(0))))
        result["same_bits"] = np.asarray(got["a"]).tobytes() == np.asarray(tree(2)["a"]).tobytes()
        result["folders"] = sorted(path.name for path in store.folder.iterdir())
    return result


if __name__ == "__main__":
    print(json.dumps({"extra_memory": extra_memory(f"{sys.argv[1]}/a"), "failure": failure(f"{sys.argv[1]}/b")}))
