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
    """P prompts that were run: their keys and values, a row each, and what predicts the next token.

    Attributes:
      cache: the tokens end in the last slot.
      hidden_PD: final hidden state of the last token that was run.
      length_P: tokens of the whole prompt, int32.
    """

    cache: LayerCaches
    hidden_PD: jax.Array
    length_P: jax.Array


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


def empty_prefix(config: ModelConfig, slots: int, length_P: jax.Array, *, cache_dtype: str) -> Prefix:
    """Prompts of which nothing was run yet."""
    rows = length_P.shape[0]
    hidden_PD = jnp.zeros((rows, config.model_dim), config.dtype)
    return Prefix(caches.empty(config, rows, slots, cache_dtype), hidden_PD, length_P)


def prefill(weights: Weights, config: ModelConfig, prefix: Prefix, tokens_PT: jax.Array, *, runtime: Runtime) -> Prefix:
    """Runs the next T tokens of prompts, which are padded on the left to the slots of `prefix`.

    Args:
      weights: of the model.
      config: the model.
      prefix: of the tokens before, whose index says how many slots are filled; T divides its slots.
      tokens_PT: token ids, anything in the padding.
      runtime: how to compute it.
    """
    time, cache = tokens_PT.shape[1], prefix.cache
    slots_1T = (cache.index + jnp.arange(time, dtype=jnp.int32))[None]
    offsets_PT = slots_1T - (cache.slots - prefix.length_P)[:, None]
    segments_PT = (offsets_PT >= 0).astype(jnp.int32)
    hidden_PTD, cache = _run(weights, config, cache, tokens_PT, jnp.maximum(offsets_PT, 0), segments_PT, runtime)
    return prefix.replace(cache=cache, hidden_PD=hidden_PTD[:, -1])  # type: ignore[attr-defined]


def empty_rows(config: ModelConfig, rows: int, slots: int, *, cache_dtype: str) -> Rows:
    """No row is active."""
    zeros, floats = functools.partial(jnp.zeros, (rows,), jnp.int32), functools.partial(jnp.zeros, (rows,), jnp.float32)
    settings = Settings(zeros(), jnp.zeros((rows,), jnp.uint32), floats(), zeros(), floats() + 1.0)
    return Rows(caches.empty(config, rows, slots, cache_dtype), zeros(), zeros(), jnp.zeros((rows,), bool), settings)


def join(
    weights: Weights, rows: Rows, prefix: Prefix, source_B: jax.Array, settings: Settings, *, top: int | None
) -> tuple[Rows, Drawn]:
    """Puts prompts into some rows, and draws their first tokens.

    Args:
      weights: of the model.
      rows: as they are.
      prefix: prompts, run to their end.
      source_B: which prompt a row takes, int32; -1 for none. Rows that take one must be free.
      settings: of those rows; anything in the others.
      top: how many of the most probable tokens to report; None for no log probabilities at all.

    Returns:
      The rows, and what was drawn, which means nothing in rows that do not join.
    """
    joining_B, from_B = source_B >= 0, jnp.maximum(source_B, 0)
    length_B = jnp.take(prefix.length_P, from_B)
    drawn = _draw(jnp.take(weights.logits(prefix.hidden_PD), from_B, axis=0), length_B, settings, top)
    places_B = jnp.nonzero(joining_B, size=source_B.shape[0])[0]

    def insert(number: jax.Array, cache: LayerCaches) -> LayerCaches:
        place = places_B[number]
        return caches.inserted(cache, prefix.cache, from_B[place], place)

    cache = jax.lax.fori_loop(0, jnp.sum(joining_B), insert, rows.cache)
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
