"""From a checkpoint of a run back to where the run was; a checkpoint that cannot be read is passed over."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from kwaicoder_jax.checkpoints import CheckpointStore
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training import processes
from kwaicoder_jax.training.state import TrainState


@dataclasses.dataclass
class Progress:
    """Host-side counters that are saved with each checkpoint.

    `step` counts batches; tokens and FLOPs are those of the steps that changed the state.
    """

    step: int = 0
    tokens: int = 0
    train_flops: float = 0.0


@dataclasses.dataclass
class Found:
    """What a checkpoint holds: see `Loop`."""

    state: TrainState
    progress: Progress
    loader: dict[str, Any]
    guard: dict[str, Any]
    evaluated: int | None


def rest(state: TrainState) -> dict[str, Any]:
    """What of the state is saved beside the model's parameters."""
    extras = {name: tree for name, tree in state.trainable.items() if name != "model"}
    return {"step": state.step, "extras": extras, "opt_state": state.opt_state}


def read(store: CheckpointStore, step: int, abstract: TrainState) -> Found:
    """Reads one step into the places of `abstract`."""
    meta = store.meta(step)
    params = store.restore(step, "params", abstract.trainable["model"])
    others = store.restore(step, "train", rest(abstract))
    state = TrainState(others["step"], {"model": params, **others["extras"]}, others["opt_state"])
    progress = Progress(**meta["progress"])
    guard = meta.get("guard", {"anchor": progress.step})
    return Found(state, progress, meta["loader"], guard, meta.get("evaluated", progress.step))


def newest(store: CheckpointStore, abstract: TrainState, on_warning: Callable[[str], None]) -> Found | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    All processes try the same one, and take it if each of them can read its part.

    Raises:
      UserError: there are whole checkpoints, and none of them can be read.
    """
    steps = processes.gather(store.complete_steps())[0]
    for step in sorted(set(store.all_steps()) - set(steps)):
        if not steps or step > steps[0]:
            on_warning(f"the checkpoint of step {step} is not whole, and passed over")
    for step in steps:
        found, problem = None, ""
        try:
            found = read(store, step, abstract)
        except Exception as error:  # whatever Orbax and TensorStore say of a file that is damaged
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        if processes.all_say(found is not None):
            return found
        store.pass_over(step)
        on_warning(f"the checkpoint of step {step} cannot be read, and is passed over ({problem or 'by a peer'})")
    if steps:
        raise UserError(
            "no checkpoint of this run can be read", where=str(store.folder), remedy="copy them again, or use --restart"
        )
    return None


def abstract_batch(shape: tuple[int, int], place: NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of so many rows and places as ShapeDtypeStructs."""
    kinds = {"inputs": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32}
    kinds["loss_mask"] = jnp.float32
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in kinds.items()}
