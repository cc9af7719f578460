"""A toy model through the real loop, whose batches may be poisoned; also what plain steps make of it."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kwaicoder_jax import checkpoints, training
from kwaicoder_jax.training import LoopConfig

MESH = training.make_mesh(training.MeshConfig(), jax.devices()[:1])
META = {"model": {"toy": 1}, "lineage": [], "identity": "x"}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda count: 0.1 / (1 + count)))
STEPS = 24
NAN, INF, HUGE = float("nan"), float("inf"), 1e4


class Numbers:
    """Batches that depend on their number alone; `poison` scales the targets of some, by number from 1."""

    def __init__(self, poison: dict[int, float] | None = None):
        self.number, self.poison, self.given = 0, poison or {}, []

    def __next__(self) -> dict[str, np.ndarray]:
        self.number += 1
        self.given.append(self.number)
        rng = np.random.default_rng(self.number)
        scale = np.full((4, 1), self.poison.get(self.number, 1.0), np.float32)
        return {"inputs": rng.integers(0, 9, (4, 5), dtype=np.int32), "scale": scale}

    def get_state(self) -> dict[str, int]:
        return {"number": self.number}

    def set_state(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
    error = trainable["model"]["table"][batch["inputs"]] * trainable["extra"][0] - frozen * batch["scale"]
    value = jnp.mean(jnp.square(error))
    return value, {"loss": value, "tokens": jnp.asarray(20.0)}


@functools.cache
def step() -> Any:
    return training.make_step(loss, OPTIMIZER, lambda step: 0.1 * jnp.ones(()))


def initial_state() -> training.TrainState:
    table = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    return training.make_state({"model": {"table": jnp.asarray(table)}, "extra": jnp.ones(1)}, OPTIMIZER)


def abstract() -> training.TrainState:
    shapes = jax.eval_shape(initial_state)
    return training.abstract_state(shapes, jax.tree.map(lambda _: training.replicated(MESH), shapes))


def held_out(params: Any, interrupted: Any = None) -> dict[str, float]:
    return {"valid_loss": float(np.sum(np.asarray(params["table"])))}


def run(folder: Any, poison: dict[int, float] | None = None, asynchronous: bool = True, **options: Any) -> Any:
    """One process: a fresh Loop on the folder. Returns the final state, the description of the last step, the loop."""
    names = ("max_skipped_steps", "spike")
    config = LoopConfig(
        STEPS, log_every=1, eval_every=7, save_every=5, **{name: options.pop(name) for name in names if name in options}
    )
    with contextlib.closing(checkpoints.CheckpointStore(folder / "checkpoints", asynchronous=asynchronous)) as store:
        toy: Any = held_out
        loop = training.Loop(
            config=config, step=step(), initial_state=initial_state, abstract=abstract(), frozen=jnp.asarray(0.5),
            loader=Numbers(poison), held_out=toy, store=store, folder=folder, mesh=MESH, meta=META,
            flops_per_token=lambda length: 2.0 * length, **options,
        )  # fmt: skip
        state = loop.run()
        return state, store.meta(store.latest_step() or 0), loop


def plain(numbers: Any, poison: dict[int, float] | None = None) -> training.TrainState:
    """The state after plain steps on these batches."""
    state, loader = initial_state(), Numbers(poison)
    state = jax.device_put(state, training.replicated(MESH))
    for number in numbers:
        loader.number = number - 1
        batch = training.shard_batch(next(loader), MESH)
        state, _ = step()(state, batch, jnp.asarray(0.5))
    return state


def assert_same_bits(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
