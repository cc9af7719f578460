"""A linear classifier of texts, trained in JAX: the mean of a text's hashed features, weighted, through a softmax.

Small enough to judge every document of a corpus on the processors that read it. Learned from anybody's labels: those of a
larger model that was asked about some thousand files, or those of sources that are known to be one thing or another.
"""

import dataclasses
import functools
import io
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kwaicoder_jax.data.quality.features import Features, features
from kwaicoder_jax.errors import UserError

_TEXTS = 256  # of a batch


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Weights, and what the classes are called.

    Attributes:
      weight_BC: float32, of each bucket for each class.
      bias_C: float32.
      classes: names.
    """

    weight_BC: np.ndarray
    bias_C: np.ndarray
    classes: tuple[str, ...]

    def probabilities(self, texts: Sequence[bytes]) -> np.ndarray:
        """Of each text for each class, float32 [texts, classes]."""
        logits = self.logits(features(texts, len(self.weight_BC)))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return weights / weights.sum(1, keepdims=True)

    def logits(self, found: Features) -> np.ndarray:
        """Of each text for each class, before the softmax."""
        sums_NC = np.concatenate(
            [np.zeros((1, len(self.classes)), np.float64), np.cumsum(self.weight_BC[found.bucket_N], 0)]
        )
        total_TC = sums_NC[found.offsets[1:]] - sums_NC[found.offsets[:-1]]
        return (total_TC * _scale(found)[:, None] + self.bias_C).astype(np.float32)

    def encoded(self) -> bytes:
        """As .npz."""
        buffer = io.BytesIO()
        np.savez(buffer, weight=self.weight_BC, bias=self.bias_C, classes=np.array(self.classes))
        return buffer.getvalue()

    @classmethod
    def decoded(cls, content: bytes) -> "Scorer":
        """The inverse of `encoded`; UserError for something else."""
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as found:
                return cls(found["weight"], found["bias"], tuple(map(str, found["classes"])))
        except (ValueError, KeyError, OSError, EOFError) as error:
            remedy = "name the scorer.npz of an earlier run, or labels to train one"
            raise UserError("is not a scorer", where="prepare_data.quality.scorer", remedy=remedy) from error


def _scale(found: Features) -> np.ndarray:
    """1 / sqrt(features): a mean would make long texts all alike, a sum would let them shout."""
    return 1.0 / np.sqrt(np.maximum(np.diff(found.offsets), 1))


def train(
    texts: Sequence[bytes], labels: np.ndarray, classes: Sequence[str], *,
    buckets: int = 2**18, epochs: int = 5, learning_rate: float = 0.05, decay: float = 1e-4, seed: int = 0,
) -> Scorer:  # fmt: skip
    """Learns from labelled texts, by Adam on the cross-entropy.

    Args:
      texts: UTF-8.
      labels: what share of each class each text has, [texts, classes]; rows add up to 1. A score s in [0, 1] is (1 - s, s).
      classes: their names.
      buckets: a power of two.
      epochs: passes over the texts.
      learning_rate: of Adam, at first; it falls to zero along a line.
      decay: of weights, a share of the learning rate.
      seed: of the order of texts.

    Raises:
      UserError: labels that do not fit, or buckets that are no power of two.
    """
    labels = np.asarray(labels, np.float32)
    if labels.shape != (len(texts), len(classes)) or not len(texts):
        what = f"{len(texts)} texts with labels {labels.shape} of {len(classes)} classes"
        raise UserError(what, where="prepare_data.quality", remedy="label each text for each class")
    if not np.allclose(labels.sum(1), 1, atol=1e-3) or labels.min() < 0:
        raise UserError("labels of a text do not add up to 1", where="prepare_data.quality")
    if buckets < 2 or buckets & (buckets - 1):
        raise UserError(f"{buckets} is no power of two", where="prepare_data.quality.buckets")
    steps = epochs * -(-len(texts) // _TEXTS)
    optimizer = optax.adamw(optax.linear_schedule(learning_rate, 0.0, steps), weight_decay=decay)
    params = {"weight": jnp.zeros((buckets, len(classes))), "bias": jnp.zeros(len(classes))}
    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for chosen in _batches(rng.permutation(len(texts))):
            batch = _padded(features([texts[place] for place in chosen], buckets), labels[chosen])
            params, state = _step(optimizer, params, state, batch)
    found = jax.device_get(params)
    return Scorer(found["weight"], found["bias"], tuple(classes))


def _batches(order: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(order), _TEXTS):
        yield order[first : first + _TEXTS]


def _padded(found: Features, labels_TC: np.ndarray) -> dict[str, np.ndarray]:
    """With features of no weight, to few lengths that are compiled, and with texts without labels."""
    count = len(found.bucket_N)
    length = max(1 << (count - 1).bit_length(), 2**10) if count else 2**10
    text_N = np.repeat(np.arange(len(labels_TC)), np.diff(found.offsets))
    scale_N = np.repeat(_scale(found), np.diff(found.offsets))
    missing, texts = length - count, _TEXTS - len(labels_TC)
    return {
        "bucket_N": np.pad(found.bucket_N, (0, missing)),
        "text_N": np.pad(text_N, (0, missing), constant_values=_TEXTS - 1).astype(np.int32),
        "scale_N": np.pad(scale_N, (0, missing)).astype(np.float32),
        "label_TC": np.pad(labels_TC, ((0, texts), (0, 0))),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(
    optimizer: optax.GradientTransformation, params: Any, state: Any, batch: dict[str, jax.Array]
) -> tuple[Any, Any]:
    def loss(params: Any) -> jax.Array:
        part_NC = params["weight"][batch["bucket_N"]] * batch["scale_N"][:, None]
        total_TC = jax.ops.segment_sum(part_NC, batch["text_N"], _TEXTS, indices_are_sorted=True)
        log_TC = jax.nn.log_softmax(total_TC + params["bias"][None])
        return -jnp.sum(batch["label_TC"] * log_TC) / jnp.sum(batch["label_TC"])

    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state
