"""A stage that trains a toy in no time, for tests of what can happen to processes; run as any stage's command.

TOY_FAULT=hang:1:7     process 1 gets no batch after its 7th
TOY_FAULT=compile:0    process 0 compiles for ever
TOY_SLOW=0.1           seconds that each batch takes
TOY_LINGER=save:3      seconds that each save takes (or evaluate, or step; alone: the stage is one of process 0 alone)
TOY_SIGNS=FOLDER       files FOLDER/PHASE.PROCESS say that a process has come to where it lingers
"""

import itertools
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.contract import Context, Stage
from experiments.driving import drive
from kwaicoder_jax import checkpoints, training

OPTIMIZER = optax.adamw(0.05)
NAMES = ("log_every", "eval_every", "save_every", "max_skipped_steps")


def fault(kind: str) -> list[int]:
    """The numbers of a fault of this kind that this process is to suffer, or nothing."""
    name, *numbers = os.environ.get("TOY_FAULT", "none").split(":")
    return [int(number) for number in numbers] if name == kind and int(numbers[0]) == jax.process_index() else []


def linger(phase: str, pause: Callable[[], bool] = lambda: False) -> None:
    """Stays as long as TOY_LINGER has it for this phase, asking `pause` all the time; ends when that says yes."""
    name, _, seconds = os.environ.get("TOY_LINGER", "none:0").partition(":")
    if name != phase:
        return
    pathlib.Path(os.environ["TOY_SIGNS"], f"{phase}.{jax.process_index()}").touch()
    for _ in range(round(float(seconds) / 0.1)):
        time.sleep(0.1)
        if pause():
            raise training.Interrupted


class Store(checkpoints.CheckpointStore):
    """Stays in a save, with the files being written."""

    def save(self, *arguments: Any) -> None:
        super().save(*arguments)
        linger("save")


class Numbers:
    """This process's rows of global batches that depend on their number alone."""

    def __init__(self, mesh: Any, poison: dict[str, str]):
        self.number, self._mesh, self._poison = 0, mesh, poison

    def __next__(self) -> dict[str, np.ndarray]:
        time.sleep(float(os.environ.get("TOY_SLOW", "0")))
        self.number += 1
        hang = fault("hang")
        if hang and self.number > hang[1]:
            time.sleep(1000)
        rng = np.random.default_rng(self.number)
        scale = np.full((8, 1), float(self._poison.get(str(self.number), "1")), np.float32)
        batch = {"inputs": rng.integers(0, 8, (8, 6), dtype=np.int32), "scale": scale}
        return training.own_rows(batch, self._mesh)

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
    """Squared error of a table; `router_bias` is added to it, as a router's would be."""
    model = trainable["model"]
    rows = model["table"][batch["inputs"]] + model["router_bias"]
    value = jnp.mean(jnp.square(rows - frozen * batch["scale"][..., None]))
    return value, {"loss": value, "tokens": jnp.asarray(48.0)}


def never() -> np.ndarray:
    """Longer than any test waits."""
    time.sleep(1000)
    return np.zeros((), np.float32)


class Slow:
    """A step whose compilation and whose calls take as long as the environment says."""

    def __init__(self, step: Any):
        self._step = step

    def lower(self, *arguments: Any) -> Any:
        if fault("compile"):
            jax.block_until_ready(jax.pure_callback(never, jax.ShapeDtypeStruct((), np.float32)))  # C code waits
        return Slow(self._step.lower(*arguments))

    def compile(self) -> Any:
        program, calls = self._step.compile(), itertools.count(1)

        def call(*arguments: Any) -> Any:
            if next(calls) > 3:  # steps that would be lost
                linger("step")
            return program(*arguments)

        return call


def run(context: Context) -> dict[str, Any]:
    section = context.section
    mesh = training.make_mesh(training.MeshConfig(**context.config.get("mesh", {})))
    places = {
        "table": NamedSharding(mesh, PartitionSpec(None, "fsdp")), "router_bias": NamedSharding(mesh, PartitionSpec())
    }  # fmt: skip

    def fresh() -> training.TrainState:
        table = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
        model = {"table": jnp.asarray(table), "router_bias": jnp.zeros(4)}
        return training.make_state({"model": model}, OPTIMIZER)

    shapes = jax.eval_shape(fresh)
    place = lambda path, _: next((x for name, x in places.items() if f"'{name}'" in jax.tree_util.keystr(path)), rest)  # noqa: E731
    rest = training.replicated(mesh)
    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    values = {name: section[name] for name in NAMES if name in section}
    if "spike" in section:
        values["spike"] = training.SpikeConfig(**section["spike"])

    def held_out(params: Any, interrupted: Any) -> dict[str, float]:
        linger("evaluate", interrupted)
        return {"valid_loss": float(total(params["table"]))}

    total = jax.jit(jnp.sum, out_shardings=rest)
    loop = training.Loop(
        config=training.LoopConfig(section["steps"], **values),
        step=Slow(training.make_step(loss, OPTIMIZER, lambda step: step * 0.0, shardings)),
        initial_state=jax.jit(fresh, out_shardings=shardings), abstract=training.abstract_state(shapes, shardings),
        frozen=jax.device_put(np.float32(0.5), rest), loader=Numbers(mesh, section["poison"]), held_out=held_out,
        store=Store(context.folder / "checkpoints", asynchronous=True),
        folder=context.folder, mesh=mesh, meta={"model": {}, "lineage": [], "identity": context.identity},
        flops_per_token=lambda length: 1.0,
    )  # fmt: skip
    drive(context, loop)
    return {"steps": section["steps"]}


def run_alone(context: Context) -> dict[str, Any]:
    """A stage of one process, with a checkpoint of its own: what its devices hold is no other process's affair."""
    linger("alone")
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {"a": jax.device_put(np.arange(6.0, dtype=np.float32), place)}
    store = checkpoints.CheckpointStore(context.folder / "checkpoints")
    store.save(0, params, {"model": {}, "lineage": [], "identity": context.identity}, {"b": params["a"] + 1})
    store.close()
    shape = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=place)
    assert (checkpoints.read_params(context.folder, {"a": shape})["a"] == params["a"]).all()
    return {"process": jax.process_index()}


ALONE = os.environ.get("TOY_LINGER", "").startswith("alone:")
STAGE = Stage("toy", run_alone, together=False) if ALONE else Stage("toy", run, together=True)

if __name__ == "__main__":
    from experiments.command import main

    main(STAGE)
