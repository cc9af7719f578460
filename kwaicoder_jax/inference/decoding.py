"""The two device programs of generation: fill the cache from padded prompts, then draw tokens until every row stops."""

from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.inference.sampling import choose_tokens, row_keys
from kwaicoder_jax.models import Cache, ModelConfig, Runtime

PREFILL_CHUNK = 512  # queries per step of prefill: bounds the scores to B * H * 512 * S floats


def last_logits(params: Any, hidden_BTD: jax.Array) -> jax.Array:
    """Logits after the last position only, [B, V]: the rest of a prompt predicts what is known."""
    return models.logits(hidden_BTD[:, -1:], models.projection(params))[:, 0]


def prefill(
    params: Any,
    config: ModelConfig,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    slots: int,
    runtime: Runtime,
    chunk: int = PREFILL_CHUNK,
) -> tuple[jax.Array, Cache]:
    """Runs prompts that are padded on the left to one length.

    Args:
      params: as `config` declares them.
      config: the model.
      tokens_BT: token ids; row b's prompt is its last lengths_B[b] entries.
      lengths_B: prompt lengths; 0 is a row without a prompt, whose results mean nothing.
      slots: size of the cache to make, at least T plus the tokens to be generated.
      runtime: how to compute it.
      chunk: queries per step; a T that it does not divide runs in one.

    Returns:
      Logits of the token after each prompt [B, V], and the cache, with its next free slot at T.
    """
    batch, time = tokens_BT.shape
    offsets_BT = jnp.arange(time, dtype=jnp.int32)[None, :] - (time - lengths_B)[:, None]
    segments_BT = (offsets_BT >= 0).astype(jnp.int32)
    positions_BT = jnp.maximum(offsets_BT, 0)
    chunk = chunk if time % chunk == 0 else time

    def step(index: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        here = [
            jax.lax.dynamic_slice_in_dim(a, index * chunk, chunk, 1) for a in (tokens_BT, positions_BT, segments_BT)
        ]
        output = models.forward(params, config, *here, runtime=runtime, cache=carry[1])
        assert output.cache is not None
        return output.hidden_BTD[:, -1:], output.cache

    hidden_BTD = jnp.zeros((batch, 1, config.model_dim), config.dtype)
    carry = (hidden_BTD, models.empty_cache(config, batch, slots))
    hidden_BTD, cache = jax.lax.fori_loop(0, time // chunk, step, carry)
    return last_logits(params, hidden_BTD), cache


def decode(
    params: Any,
    config: ModelConfig,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    max_new_tokens: int,
    ids_B: jax.Array,
    seed: jax.Array,
    temperature_B: jax.Array,
    top_p_B: jax.Array,
    stop_tokens: jax.Array,
    runtime: Runtime,
) -> tuple[jax.Array, jax.Array]:
    """Generates for one batch; to be jitted with config, max_new_tokens and runtime static.

    Args:
      params: as `config` declares them.
      config: the model.
      tokens_BT: prompts, padded on the left.
      lengths_B: prompt lengths; a row of length 0 only fills up the batch and counts as stopped.
      max_new_tokens: the most tokens to generate per row, 1 or more.
      ids_B: identity of each prompt in `row_keys`.
      seed: int32 scalar.
      temperature_B: see `choose_tokens`.
      top_p_B: see `choose_tokens`.
      stop_tokens: a row ends when it draws one of these, [any number].
      runtime: how to compute it.

    Returns:
      New tokens [B, max_new_tokens], and how many of them count per row [B]: those before its stop token.
    """
    slots = tokens_BT.shape[1] + max_new_tokens
    logits_BV, cache = prefill(params, config, tokens_BT, lengths_B, slots=slots, runtime=runtime)

    def draw(logits_BV: jax.Array, step: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The token at `step`, written down for the rows that go on."""
        generated_BT, counts_B, active_B = state
        token_B = choose_tokens(logits_BV, row_keys(seed, ids_B, lengths_B + step), temperature_B, top_p_B)
        generated_BT = jax.lax.dynamic_update_slice(generated_BT, token_B[:, None], (0, step))
        active_B &= ~jnp.any(token_B[:, None] == stop_tokens[None, :], axis=-1)
        return generated_BT, counts_B + active_B, active_B

    def go_on(carry: tuple) -> jax.Array:
        step, _, (_, _, active_B) = carry
        return (step < max_new_tokens) & jnp.any(active_B)

    def advance(carry: tuple) -> tuple:
        step, cache, state = carry
        token_B1 = jax.lax.dynamic_slice_in_dim(state[0], step - 1, 1, axis=1)
        position_B1 = (lengths_B + step - 1)[:, None]
        output = models.forward(
            params, config, token_B1, position_B1, jnp.ones_like(token_B1), runtime=runtime, cache=cache
        )
        return step + 1, output.cache, draw(last_logits(params, output.hidden_BTD), step, state)

    batch = tokens_BT.shape[0]
    state = (jnp.zeros((batch, max_new_tokens), jnp.int32), jnp.zeros((batch,), jnp.int32), lengths_B > 0)
    first = jnp.zeros((), jnp.int32)
    carry = (first + 1, cache, draw(logits_BV, first, state))
    _, _, (generated_BT, counts_B, _) = jax.lax.while_loop(go_on, advance, carry)
    return generated_BT, counts_B
