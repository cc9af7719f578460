"""How far two models' logits are apart on the same tokens; and from one teacher, which is run once, to many students."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.batches import TARGETS, Batch, entries

Pair = tuple[jax.Array, jax.Array]
LARGEST = ("max_error", "max_logit")  # of what `compare` returns; the rest are sums


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
        self._batches = [dict(zip(TARGETS, entries(batch, number, TARGETS))) for number, batch in enumerate(batches)]
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
    """One batch's sums of KL and of the student's cross-entropy, float32."""
    hidden = (hidden_BTC, _hidden(params, batch, config=config, runtime=runtime))
    found = compare(hidden, (projection_VC, models.projection(params)), batch, logit_elements)
    return jnp.stack([found["kl"], found["other_loss"]])


def compare(
    hidden: Pair, projections: Pair, batch: Mapping[str, jax.Array], logit_elements: int
) -> dict[str, jax.Array]:
    """Sums over the tokens of the loss mask, and maxima over unpadded ones, a slice of time at a time; float32.

    Args:
      hidden: final states of the reference and of the other model, [B, T, their D].
      projections: to logits, [V, their D].
      batch: "segment_ids", "targets", "loss_mask", [B, T].
      logit_elements: most elements of one model's logits that are live at once.

    Returns:
      "kl" (from reference to other), "loss" and "other_loss" (cross-entropies), "max_error", "max_logit".
    """
    rows, time = batch["targets"].shape
    width = min(time, max(1, logit_elements // (projections[0].shape[0] * rows)))
    count = -(-time // width)

    def slices(x):  # the last one is filled up with zeros, which the masks leave out; rows stay whole and sharded
        padded = jnp.pad(x, [(0, 0), (0, width * count - time), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(rows, count, width, *x.shape[2:]), 1, 0)

    def step(total, columns):
        one = _compare_slice(columns, projections)
        return {name: (jnp.maximum if name in LARGEST else jnp.add)(total[name], one[name]) for name in one}, None

    columns = (*hidden, batch["targets"], batch["loss_mask"].astype(jnp.float32), batch["segment_ids"] > 0)
    zero = dict.fromkeys((*LARGEST, "loss", "other_loss", "kl"), jnp.zeros(()))
    return jax.lax.scan(step, zero, [slices(x) for x in columns])[0]


def _compare_slice(columns: Sequence[jax.Array], projections: Pair) -> dict[str, jax.Array]:
    """The same for C tokens of each row."""
    *hidden, targets_BC, mask_BC, seen_BC = columns
    a, b = (models.logits(x, w) for x, w in zip(hidden, projections))
    log_a, log_b = jax.nn.log_softmax(a, axis=-1), jax.nn.log_softmax(b, axis=-1)
    kl_BC = jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)
    chosen_a, chosen_b = (jnp.take_along_axis(x, targets_BC[:, :, None], axis=-1)[:, :, 0] for x in (log_a, log_b))
    seen = seen_BC[:, :, None]
    return {
        "max_error": jnp.max(jnp.where(seen, jnp.abs(a - b), 0.0)),
        "max_logit": jnp.max(jnp.where(seen, jnp.abs(a), 0.0)),
        "loss": -jnp.sum(mask_BC * chosen_a),
        "other_loss": -jnp.sum(mask_BC * chosen_b),
        "kl": jnp.sum(mask_BC * kl_BC),
    }
