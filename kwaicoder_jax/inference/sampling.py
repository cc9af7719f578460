"""From logits to tokens: greedy, temperature, top-k and top-p, each row with its own settings and its own randomness.

The settings are arrays, not constants of the compiled program: one program serves every temperature, and rows of one
batch may differ.
"""

import flax.struct
import jax
import jax.numpy as jnp

DRAWING = "drawing"  # scope of what greedy batches skip, in the names of instructions


@flax.struct.dataclass
class Settings:
    """How the tokens of each row are drawn.

    Attributes:
      seed_B: int32.
      id_B: uint32; tells apart the samples of one seed.
      temperature_B: logits are divided by it; 0 takes the most probable token, the lowest id among equals.
      top_k_B: only so many of the most probable tokens can be drawn (ties by lower id); 0 for all.
      top_p_B: of those, renormalised, only the tokens of `nucleus`; 1 for all.
    """

    seed_B: jax.Array
    id_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array


def row_keys(seed_B: jax.Array, ids_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """One random key per row, [B], from (seed, the prompt's id, the position of the token to be drawn), nothing else.

    So a sample does not depend on which prompts share its batch, on their order, or on the batch's size.
    """
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(jax.vmap(jax.random.key)(seed_B), ids_B), positions_B)


def highest(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """The mask [B, V] of the top_k highest logits, of equal ones those with lower ids; 0 or V and more keep all."""
    bits_BV = jax.lax.bitcast_convert_type(jnp.where(logits_BV == 0.0, 0.0, logits_BV), jnp.int32)  # -0 equals 0
    # As unsigned integers that order as the floats do: the sign bit set for positive ones, all bits flipped for others.
    flip_BV = jnp.where(bits_BV < 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0x80000000))
    order_BV = jax.lax.bitcast_convert_type(bits_BV, jnp.uint32) ^ flip_BV

    def refine(step: jax.Array, border_B: jax.Array) -> jax.Array:
        candidate_B = border_B | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        enough_B = jnp.sum(order_BV >= candidate_B[:, None], axis=-1) >= top_k_B
        return jnp.where(enough_B, candidate_B, border_B)

    border_B1 = jax.lax.fori_loop(0, 32, refine, jnp.zeros(top_k_B.shape, jnp.uint32))[:, None]
    above_BV, equal_BV = order_BV > border_B1, order_BV == border_B1
    left_B1 = top_k_B[:, None] - jnp.sum(above_BV, axis=-1, keepdims=True)
    return above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= left_B1)) | (top_k_B[:, None] <= 0)


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The mask [B, V] of the fewest most probable tokens whose probabilities sum to top_p or more (Holtzman 2020).

    At least one token is kept; of equally probable tokens at the border the lowest ids are. top_p of 1 keeps all.
    """
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)
    # Naively: sort, add up, cut, scatter back. A sort of the vocabulary costs ten times what follows on CPU: as
    # non-negative floats order as their bits do, find the border's bits one by one, the highest value for which the
    # tokens at or above it reach top_p.
    bits_BV = jax.lax.bitcast_convert_type(probability_BV, jnp.int32)

    def refine(step: int, border_B: jax.Array) -> jax.Array:
        candidate_B = border_B | (1 << (29 - step))  # bit 30 is set in no float up to 1
        mass_B = jnp.sum(jnp.where(bits_BV >= candidate_B[:, None], probability_BV, 0.0), axis=-1)
        return jnp.where(mass_B >= top_p_B, candidate_B, border_B)

    border_B1 = jax.lax.fori_loop(0, 30, refine, jnp.zeros(top_p_B.shape, jnp.int32))[:, None]
    above_BV, equal_BV = bits_BV > border_B1, bits_BV == border_B1
    above_B1 = jnp.sum(jnp.where(above_BV, probability_BV, 0.0), axis=-1, keepdims=True)
    earlier_BV = jnp.cumsum(equal_BV, axis=-1) - 1  # equal tokens of lower id
    mass_BV = above_B1 + earlier_BV * jax.lax.bitcast_convert_type(border_B1, jnp.float32)
    kept_BV = above_BV | (equal_BV & (mass_BV < top_p_B[:, None]))
    return kept_BV | (top_p_B[:, None] >= 1.0)  # rounding of the sums must not drop the tail


def choose_tokens(logits_BV: jax.Array, positions_B: jax.Array, settings: Settings) -> jax.Array:
    """Draws one token per row, [B] int32.

    Args:
      logits_BV: float32.
      positions_B: of the tokens to be drawn, see `row_keys`.
      settings: of the rows.
    """

    @jax.named_scope(DRAWING)
    def sample() -> jax.Array:
        scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, settings.temperature_B)[:, None]
        for limits_B, limit, mask in ((top_k_B > 0, top_k_B, highest), (top_p_B < 1.0, top_p_B, nucleus)):
            scaled_BV = jax.lax.cond(
                jnp.any(~greedy_B & limits_B),
                lambda x_BV, limit=limit, mask=mask: jnp.where(mask(x_BV, limit), x_BV, -jnp.inf),
                lambda x_BV: x_BV,
                scaled_BV,
            )
        return _inverse_cdf(scaled_BV, row_keys(settings.seed_B, settings.id_B, positions_B))

    greedy_B, top_k_B, top_p_B = settings.temperature_B <= 0.0, settings.top_k_B, settings.top_p_B
    best_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # Greedy batches (evaluation) skip the searches and the sums.
    return jax.lax.cond(jnp.all(greedy_B), lambda: best_B, lambda: jnp.where(greedy_B, best_B, sample()))


def _inverse_cdf(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Draws from softmax(logits) with one uniform number per row; Gumbel noise takes V, and half the step.

    The first token whose cumulative probability exceeds u of the total; a token of probability 0 is never drawn, even
    though a parallel sum in float32 may step up where nothing was added.
    """
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)
    reached_BV = jnp.where(probability_BV > 0, jnp.cumsum(probability_BV, axis=-1), -1.0)
    uniform_B = jax.vmap(jax.random.uniform)(keys_B)
    threshold_B1 = uniform_B[:, None] * jnp.max(reached_BV, axis=-1, keepdims=True)
    return jnp.argmax(reached_BV > threshold_B1, axis=-1).astype(jnp.int32)
