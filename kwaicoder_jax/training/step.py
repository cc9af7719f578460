"""One train step, and one evaluation of held-out loss."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from kwaicoder_jax import models
from kwaicoder_jax.training.accumulation import accumulate
from kwaicoder_jax.training.losses import move_biases, run_model
from kwaicoder_jax.training.mesh import own_rows, shard_batch
from kwaicoder_jax.training.state import TrainState

# (trainable, batch, frozen) -> (loss, metrics). `frozen` is a tree that is not trained, such as a teacher.
LossFunction = Callable[[Any, dict[str, jax.Array], Any], tuple[jax.Array, dict[str, jax.Array]]]
StepFunction = Callable[[TrainState, dict[str, jax.Array], Any], tuple[TrainState, dict[str, jax.Array]]]


def make_step(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    rate: Callable[[jax.Array], jax.Array],
    shardings: TrainState | None = None,
    compiler_options: Mapping[str, str] | None = None,
    microbatches: int = 1,
    bias_rate: float = 0.0,
) -> StepFunction:
    """Forward, backward and update as one jitted function; the old state's buffers are given away.

    With `microbatches` the rows of a batch are worked on in so many parts, one after the other, and gradients are added
    up in float32 (see `accumulate`). With `bias_rate` the routers' selection biases follow the load, outside of the optimizer
    (see `losses.move_biases`).

    Where the loss or the gradient is not finite, the state stays as it is, its counts included, and the metric
    "skipped" is 1.
    """

    def step(state: TrainState, batch: dict[str, jax.Array], frozen: Any):
        gradient_of = jax.value_and_grad(loss_function, has_aux=True)
        if microbatches > 1:
            gradient_of = accumulate(gradient_of, microbatches)
        (loss, metrics), gradients = gradient_of(state.trainable, batch, frozen)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        if bias_rate:
            trainable = {**trainable, "model": move_biases(trainable["model"], metrics, bias_rate)}
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        metrics |= {"gradient_norm": norm, "learning_rate": rate(state.step), "skipped": ~finite}
        new = TrainState(state.step + 1, trainable, opt_state)
        return jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state), metrics

    out = None if shardings is None else (shardings, None)
    options: Any = dict(compiler_options) if compiler_options else None
    return jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)


class Interrupted(Exception):
    """An evaluation was given up, as its caller asked."""


class HeldOutLoss:
    """Cross-entropy on fixed validation batches, without fill-in-the-middle and auxiliary losses."""

    def __init__(
        self,
        config: models.ModelConfig,
        batches: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
        mesh: Mesh,
        runtime: models.Runtime | None = None,
    ):
        runtime = runtime or models.Runtime()

        def sums(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BTD = run_model(params, config, batch, runtime).hidden_BTD
            projection_VD = models.projection(params)
            mask_BT = batch["loss_mask"]
            return models.cross_entropy(hidden_BTD, projection_VD, batch["targets"], mask_BT), jnp.sum(mask_BT)

        self._sums: Any = jax.jit(sums)
        self._compiled: dict[Any, Any] = {}
        self._batches = {
            source: [shard_batch(own_rows(batch, mesh), mesh) for batch in each] for source, each in batches.items()
        }

    def compile(self, params: Any) -> None:
        """Compiles for parameters (or ShapeDtypeStructs with shardings) ahead of the first call."""
        for batch in (batch for each in self._batches.values() for batch in each):
            shape = batch["inputs"].shape
            if shape not in self._compiled:
                self._compiled[shape] = self._sums.lower(params, batch).compile()

    def __call__(self, params: Any, interrupted: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """{"valid_loss": nats per token over all sources, "valid_loss_by_source": {...}}.

        `interrupted` is asked after each batch; where it says yes, Interrupted is raised.
        """
        sums: dict[str, list[Any]] = {}
        last: list[Any] = []
        for source, each in self._batches.items():
            sums[source] = []
            for batch in each:
                run = self._compiled.get(batch["inputs"].shape, self._sums)
                sums[source].append(run(params, batch))
                last = [*last, sums[source][-1]][-3:]
                jax.block_until_ready(last[0])  # two batches on their way are enough, and an answer is soon heard
                if interrupted():
                    raise Interrupted
        totals = {source: np.sum(np.asarray(jax.device_get(each), np.float64), 0) for source, each in sums.items()}
        loss, tokens = np.sum(list(totals.values()), axis=0)
        by_source = {source: float(each[0] / max(each[1], 1)) for source, each in totals.items()}
        return {"valid_loss": float(loss / max(tokens, 1)), "valid_loss_by_source": by_source}
