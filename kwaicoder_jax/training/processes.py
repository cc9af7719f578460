"""Several processes that train one model: what they have to agree on, without waiting for one another in each step."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Vote = Callable[[bool], bool]


def make_vote(mesh: Mesh) -> Vote:
    """A function that all processes call equally often: whether any of them said yes, the same for all of them.

    One process has its answer at once. Several get that to the call before: theirs is a sum on the devices, which
    runs behind the train step, so that nobody waits for it. The first answer is no.
    """
    return (lambda yes: yes) if jax.process_count() == 1 else _DeviceVote(mesh)


class _DeviceVote:
    def __init__(self, mesh: Mesh):
        self._place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._mine, self._size = len(mesh.local_devices), mesh.size
        self._before: jax.Array | None = None

    def __call__(self, yes: bool) -> bool:
        mine = np.full(self._mine, yes, np.int32)
        before, self._before = self._before, self._any(jax.make_array_from_process_local_data(self._place, mine))
        return before is not None and bool(jax.device_get(before))


def gather(value: Any) -> list[Any]:
    """What each process calls it with, a JSON value, in the order of the processes; they wait for one another."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(text)] = text
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(rows[number, : int(size)].tobytes()) for number, size in enumerate(sizes)]


def all_say(yes: bool) -> bool:
    """Whether every process says yes; they wait for one another."""
    return all(gather(bool(yes)))


@functools.cache
def is_writer() -> bool:
    """Whether this process writes the files that there is one of."""
    return jax.process_index() == 0
