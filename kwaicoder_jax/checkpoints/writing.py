"""How arrays are handed to Orbax: copied first where the device's memory is the host's, then written a little at a time.

A save may go on while the next train step runs, and that step gives the state's buffers away. On an accelerator Orbax
copies to the host before it returns. On CPU it would keep a view of the very buffers: they are copied here, one array
after the other. What is being encoded is bounded as well: left alone, Orbax holds up to 2 GiB of finished chunks back
to write them as one file, and encodes every array at once.
"""

import asyncio
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

FILE_BYTES = 64 * 2**20  # chunks are held back until there are this many of them
ENCODED_BYTES = 64 * 2**20  # arrays being encoded at a time; one that is larger is encoded alone
_SPARE = 1024

Tree = Any


class Handler(ocp.StandardCheckpointHandler):
    """Writes what `ocp.StandardCheckpointHandler` does, under its name, in bounded memory."""

    def __init__(self, largest: int = 0, alone: bool = False):
        """`largest`: bytes of the largest piece of an array on one device; `alone`: as `is_alone` says."""
        room = max(ENCODED_BYTES, largest) + _SPARE  # Orbax wants more room than the largest piece takes
        super().__init__(
            save_concurrent_gb=room / 1e9,  # type: ignore[arg-type]
            multiprocessing_options=processes(alone),
        )

    @classmethod
    def typestr(cls) -> str:
        """Any reader of ordinary checkpoints reads them."""
        return ocp.StandardCheckpointHandler.typestr()

    async def async_save(self, directory: Any, item: Any = None, save_args: Any = None, args: Any = None) -> Any:
        """As the handler above, but for the size of the files."""
        self._validate_save_state(args.item, args.save_args)
        save = ocp.args.PyTreeSave(args.item, args.save_args, ocdbt_target_data_file_size=FILE_BYTES)
        return await self._impl.async_save(directory, args=save)

    def save(self, directory: Any, *arguments: Any, **named: Any) -> None:
        """Synchronously."""

        async def whole() -> None:
            for commit in await self.async_save(directory, *arguments, **named) or ():
                commit.result()

        asyncio.run(whole())


def registry(trees: Tree) -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    """The handlers of a manager that saves `trees` as "params" and "train", with a JSON description "meta"."""
    found = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ("params", "train"):
        handler = Handler(largest_piece(trees), is_alone(trees))
        found.add(item, ocp.args.StandardSave, handler)
        found.add(item, ocp.args.StandardRestore, handler)
    found.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
    return found


def largest_piece(tree: Tree) -> int:
    """Bytes of the largest part of an array that one device holds."""
    return max((_piece(leaf) for leaf in jax.tree.leaves(tree)), default=0)


def _piece(leaf: Any) -> int:
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf).nbytes
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize


def is_alone(tree: Tree) -> bool:
    """Whether there are several processes, and the arrays (or ShapeDtypeStructs) lie on this one's devices alone."""
    if jax.process_count() == 1:
        return False
    places = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree)]
    return all(place is None or place.is_fully_addressable for place in places)


def processes(alone: bool) -> ocp.options.MultiprocessingOptions:
    """Who takes part in a save or a restore, as Orbax wants to know it."""
    if not alone:
        return ocp.options.MultiprocessingOptions()
    here = jax.process_index()
    return ocp.options.MultiprocessingOptions(here, active_processes={here}, barrier_sync_key_prefix=f"alone_{here}")


def apart(tree: Tree) -> Tree:
    """`tree` with buffers that no train step gives away; on accelerators the tree itself, which Orbax copies."""
    return jax.tree.map(_copy, tree)


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or next(iter(leaf.devices())).platform != "cpu":
        return leaf
    shards = [jax.device_put(shard.data, shard.device, may_alias=False) for shard in leaf.addressable_shards]
    jax.block_until_ready(shards)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards, dtype=leaf.dtype)
