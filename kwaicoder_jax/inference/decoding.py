"""The device programs of generation, pure functions of weights and rows: run a prompt, let it join, draw the next tokens."""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.inference import cache as caches
from kwaicoder_jax.inference.cache import LayerCaches
from kwaicoder_jax.inference.sampling import Settings, choose_tokens
from kwaicoder_jax.inference.weights import Weights
from kwaicoder_jax.models import ModelConfig, Runtime


@flax.struct.dataclass
class Prefix:
    """A prompt that was run: its keys and values, one row, and what it predicts.

    Attributes:
      cache: the tokens end in the last slot.
      hidden_1D: final hidden state of the last token that was run.
      length: tokens of the whole prompt, int32 scalar.
    """

    cache: LayerCaches
    hidden_1D: jax.Array
    length: jax.Array


@flax.struct.dataclass
class Rows:
    """What decode steps hand on, for B rows: the cache, and of each row its newest token, which is not in it yet."""

    cache: LayerCaches
    token_B: jax.Array
    position_B: jax.Array
    active_B: jax.Array
    settings: Settings


@flax.struct.dataclass
class Drawn:
    """The tokens of one step.

    Attributes:
      token_B: int32.
      scores: None where nobody asked.
    """

    token_B: jax.Array
    scores: "Scores | None"


@flax.struct.dataclass
class Scores:
    """Log probabilities in nats, before temperature, top-k and top-p.

    Attributes:
      logprob_B: of the drawn token.
      top_BA: the A most probable tokens.
      top_logprob_BA: theirs.
    """

    logprob_B: jax.Array
    top_BA: jax.Array
    top_logprob_BA: jax.Array


def empty_prefix(config: ModelConfig, slots: int, length: jax.Array, *, cache_dtype: str) -> Prefix:
    """A prompt of which nothing was run yet."""
    hidden_1D = jnp.zeros((1, config.model_dim), config.dtype)
    return Prefix(caches.empty(config, 1, slots, cache_dtype), hidden_1D, length)


def prefill(weights: Weights, config: ModelConfig, prefix: Prefix, tokens_T: jax.Array, *, runtime: Runtime) -> Prefix:
    """Runs the next T tokens of a prompt, which is padded on the left to the slots of `prefix`.

    Args:
      weights: of the model.
      config: the model.
      prefix: of the tokens before, whose index says how many slots are filled; T divides its slots.
      tokens_T: token ids, anything in the padding.
      runtime: how to compute it.
    """
    time, cache = tokens_T.shape[0], prefix.cache
    offsets_1T = (cache.index + jnp.arange(time, dtype=jnp.int32) - (cache.slots - prefix.length))[None]
    segments_1T = (offsets_1T >= 0).astype(jnp.int32)
    hidden_1TD, cache = _run(weights, config, cache, tokens_T[None], jnp.maximum(offsets_1T, 0), segments_1T, runtime)
    return prefix.replace(cache=cache, hidden_1D=hidden_1TD[:, -1])  # type: ignore[attr-defined]


def empty_rows(config: ModelConfig, rows: int, slots: int, *, cache_dtype: str) -> Rows:
    """No row is active."""
    zeros, floats = functools.partial(jnp.zeros, (rows,), jnp.int32), functools.partial(jnp.zeros, (rows,), jnp.float32)
    settings = Settings(zeros(), jnp.zeros((rows,), jnp.uint32), floats(), zeros(), floats() + 1.0)
    return Rows(caches.empty(config, rows, slots, cache_dtype), zeros(), zeros(), jnp.zeros((rows,), bool), settings)


def join(
    weights: Weights, rows: Rows, prefix: Prefix, joining_B: jax.Array, settings: Settings, *, top: int | None
) -> tuple[Rows, Drawn]:
    """Puts one prompt into some rows, and draws their first tokens.

    Args:
      weights: of the model.
      rows: as they are.
      prefix: the prompt, run to its end.
      joining_B: which rows it takes; they must be free.
      settings: of those rows; anything in the others.
      top: how many of the most probable tokens to report; None for no log probabilities at all.

    Returns:
      The rows, and what was drawn, which means nothing in rows that do not join.
    """
    batch = joining_B.shape[0]
    length_B = jnp.broadcast_to(prefix.length[None], (batch,))
    logits_1V = weights.logits(prefix.hidden_1D)
    drawn = _draw(jnp.broadcast_to(logits_1V, (batch, logits_1V.shape[1])), length_B, settings, top)
    places_B = jnp.nonzero(joining_B, size=batch)[0]
    cache = jax.lax.fori_loop(
        0, jnp.sum(joining_B), lambda i, cache: caches.inserted(cache, prefix.cache, places_B[i]), rows.cache
    )
    new, old = (drawn.token_B, length_B, settings), (rows.token_B, rows.position_B, rows.settings)
    token_B, position_B, settings = jax.tree.map(functools.partial(jnp.where, joining_B), new, old)
    return Rows(cache, token_B, position_B, rows.active_B | joining_B, settings), drawn


def leave(rows: Rows, leaving_B: jax.Array) -> Rows:
    """Some rows end; what they still draw means nothing."""
    return rows.replace(active_B=rows.active_B & ~leaving_B)  # type: ignore[attr-defined]


def decode(
    weights: Weights, config: ModelConfig, rows: Rows, *, top: int | None, runtime: Runtime
) -> tuple[Rows, Drawn]:
    """Runs the newest token of every row, and draws the next one."""
    active_B1 = rows.active_B[:, None].astype(jnp.int32)
    hidden_B1D, cache = _run(
        weights, config, rows.cache, rows.token_B[:, None], rows.position_B[:, None], active_B1, runtime
    )
    position_B = rows.position_B + 1
    drawn = _draw(weights.logits(hidden_B1D[:, 0]), position_B, rows.settings, top)
    return rows.replace(cache=cache, token_B=drawn.token_B, position_B=position_B), drawn  # type: ignore[attr-defined]


def resize(rows: Rows, rows_B: jax.Array, *, slots: int) -> Rows:
    """Rows in other places and a cache of other slots; see `cache.resized`."""
    old = (rows.token_B, rows.position_B, rows.active_B, rows.settings)
    token_B, position_B, active_B, settings = jax.tree.map(lambda x_B: jnp.take(x_B, jnp.maximum(rows_B, 0)), old)
    return Rows(caches.resized(rows.cache, rows_B, slots), token_B, position_B, active_B & (rows_B >= 0), settings)


def _run(
    weights: Weights,
    config: ModelConfig,
    cache: LayerCaches,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    runtime: Runtime,
) -> tuple[jax.Array, LayerCaches]:
    inputs = (tokens_BT, positions_BT, segments_BT)
    output = models.forward(weights.params(), config, *inputs, runtime=runtime, cache=cache.stacked())
    assert output.cache is not None
    return output.hidden_BTD, caches.unstacked(output.cache)


def _draw(logits_BV: jax.Array, positions_B: jax.Array, settings: Settings, top: int | None) -> Drawn:
    token_B = choose_tokens(logits_BV, positions_B, settings)
    if top is None:
        return Drawn(token_B, None)
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    logprob_B = (jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1) - total_B1)[:, 0]
    logits_BA, top_BA = jax.lax.top_k(logits_BV, top)
    return Drawn(token_B, Scores(logprob_B, top_BA.astype(jnp.int32), logits_BA - total_B1))
