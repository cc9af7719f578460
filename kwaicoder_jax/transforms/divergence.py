"""KL from one teacher to many students on the same tokens; the teacher is run once."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError

Batch = Mapping[str, Any]  # "inputs", "positions", "segment_ids", "targets", "loss_mask": [B, T]
_FIELDS = ("inputs", "positions", "segment_ids", "targets", "loss_mask")


@dataclasses.dataclass(frozen=True)
class Distance:
    """Means over the tokens under the loss mask, nats: KL(teacher || student) and the student's cross-entropy."""

    kl: float
    loss: float


class Teacher:
    """The reference of a search.

    Its final hidden states are kept (D numbers a token, where logits would be V), so that it is run once and not once a
    student; what exceeds `cache_elements` is computed anew each time.
    """

    def __init__(
        self,
        params: models.Params,
        config: models.ModelConfig,
        batches: Sequence[Batch],
        *,
        runtime: models.Runtime | None = None,
        cache_elements: int = 1 << 28,
        logit_elements: int = 1 << 24,
    ):
        """Runs the teacher.

        Args:
          params: of the teacher.
          config: the teacher.
          batches: dicts of "inputs", "positions", "segment_ids", "targets", "loss_mask", each [B, T].
          runtime: how to compute all models.
          cache_elements: most numbers of hidden states that are kept.
          logit_elements: most elements of one model's logits that are live at once.
        """
        self._params, self._config, self._runtime = params, config, runtime or models.Runtime()
        self._logit_elements = logit_elements
        for number, batch in enumerate(batches):
            for name in _FIELDS:
                if name not in batch:
                    raise UserError(
                        f"batch {number} has no {name!r}", where="batches", remedy=f"it has {sorted(batch)}"
                    )
        self._batches = [{name: batch[name] for name in _FIELDS} for batch in batches]
        self.tokens = float(sum(np.asarray(jnp.sum(batch["loss_mask"]), np.float64) for batch in self._batches))
        if not self.tokens:
            raise UserError("no tokens to compare on", where="batches", remedy="give a batch with an open loss mask")
        self._hidden: dict[int, jax.Array] = {}
        for number, batch in enumerate(self._batches):
            cache_elements -= batch["inputs"].size * config.model_dim
            if cache_elements >= 0:
                self._hidden[number] = self._run(number)

    def _run(self, number: int) -> jax.Array:
        return _hidden(self._params, self._batches[number], config=self._config, runtime=self._runtime)

    def distance(self, params: models.Params, config: models.ModelConfig) -> Distance:
        """How far a student of the same vocabulary is."""
        if config.vocab_size != self._config.vocab_size:
            raise UserError(f"{config.vocab_size} and {self._config.vocab_size} words", where="model.vocab_size")
        projection_VC, total = models.projection(self._params), np.zeros(2)
        for number, batch in enumerate(self._batches):
            hidden_BTC = self._hidden[number] if number in self._hidden else self._run(number)
            sums = _sums(
                params, hidden_BTC, projection_VC, batch, config=config, runtime=self._runtime,
                logit_elements=self._logit_elements,
            )  # fmt: skip
            total += np.asarray(sums, np.float64)
        return Distance(*(total / self.tokens).tolist())


@functools.partial(jax.jit, static_argnames=("config", "runtime"))
def _hidden(params, batch, *, config, runtime) -> jax.Array:
    tokens = (batch["inputs"], batch["positions"], batch["segment_ids"])
    return models.forward(params, config, *tokens, runtime=runtime).hidden_BTD


@functools.partial(jax.jit, static_argnames=("config", "runtime", "logit_elements"))
def _sums(params, hidden_BTC, projection_VC, batch, *, config, runtime, logit_elements) -> jax.Array:
    """One batch's sums of KL and of cross-entropy, float32, a slice of time at a time."""
    rows, time = batch["inputs"].shape
    width = min(time, max(1, logit_elements // (config.vocab_size * rows)))
    count = -(-time // width)

    def slices(x):  # the last one is filled up with zeros, which the mask leaves out; rows stay whole and sharded
        padded = jnp.pad(x, [(0, 0), (0, width * count - time), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    student_BTD = _hidden(params, batch, config=config, runtime=runtime)
    projection_VD = models.projection(params)

    def step(total_2, columns):
        teacher_BCC, student_BCD, targets_BC, mask_BC = columns
        log_p, log_q = (
            jax.nn.log_softmax(models.logits(x, w), axis=-1)
            for x, w in ((teacher_BCC, projection_VC), (student_BCD, projection_VD))
        )
        kl_BC = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        chosen_BC = jnp.take_along_axis(log_q, targets_BC[:, :, None], axis=-1)[:, :, 0]
        return total_2 + jnp.stack([jnp.sum(mask_BC * kl_BC), -jnp.sum(mask_BC * chosen_BC)]), None

    columns = (hidden_BTC, student_BTD, batch["targets"], batch["loss_mask"].astype(jnp.float32))
    return jax.lax.scan(step, jnp.zeros(2), [slices(x) for x in columns])[0]
