"""Whether tokens take whole virtual groups, the G experts e = r*G .. r*G + G-1 of a replica, and where only order decides."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.models.moe import selection


def count(
    x_BTD: jax.Array, params: Mapping[str, Any], mask_BT: jax.Array, *, experts: models.ExpertsConfig, granularity: int
) -> dict[str, jax.Array]:
    """Counts tokens of one mixture layer.

    A token that takes whole groups takes 0 or G experts of each replica, and of k = T/G replicas (rounded up).

    Args:
      x_BTD: inputs of the layer.
      params: of the layer: "router" [D, E], "router_bias" [E] if any.
      mask_BT: tokens that count.
      experts: the mixture.
      granularity: G.

    Returns:
      "ties": tokens whose k-th and (k+1)-th replica are ranked by the same float32 value; "broken": tokens that took
      experts of more than k replicas; float32 scalars.
    """
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(jnp.float32)
    router_DE = params["router"].astype(jnp.float32)
    logits_ME = jnp.einsum("MD,DE->ME", x_MD, router_DE, precision=jax.lax.Precision.HIGHEST)
    ranked_by_ME = selection(logits_ME, params.get("router_bias"), experts)
    _, index_MX, _ = models.choose_experts(logits_ME, experts, ranked_by_ME)
    return count_choice(
        logits_ME if ranked_by_ME is None else ranked_by_ME, index_MX, mask_BT.reshape(-1), granularity=granularity
    )


def count_choice(
    ranked_by_ME: jax.Array, index_MX: jax.Array, mask_M: jax.Array, *, granularity: int
) -> dict[str, jax.Array]:
    """`count`, from what experts are ranked by and the choice that was made."""
    replicas = ranked_by_ME.shape[1] // granularity
    top = -(-index_MX.shape[1] // granularity)
    mask_M = mask_M.astype(jnp.float32)
    best_MR = jnp.max(ranked_by_ME.reshape(-1, replicas, granularity), axis=-1)
    ties = jnp.zeros(())
    if top < replicas:
        sorted_MR = jax.lax.top_k(best_MR, top + 1)[0]
        ties = jnp.sum(mask_M * (sorted_MR[:, top - 1] == sorted_MR[:, top]))
    taken_MXR = jax.nn.one_hot(index_MX // granularity, replicas, dtype=jnp.bool_)
    touched_M = jnp.sum(jnp.any(taken_MXR, axis=1), axis=-1)
    return {"ties": ties, "broken": jnp.sum(mask_M * (touched_M > top))}
