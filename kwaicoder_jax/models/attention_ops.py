"""Masked grouped-query attention as a function of arrays; back ends differ in speed only."""

import enum
import functools

import jax
import jax.numpy as jnp

from kwaicoder_jax.models import context_attention, gpu_attention, splash_attention
from kwaicoder_jax.models.attention_sharding import on_each_device
from kwaicoder_jax.models.remat import ATTENTION, named

_MASKED = -1e30


class AttentionBackend(enum.StrEnum):
    """Which implementation computes attention."""

    AUTO = "auto"  # splash on TPU, flash on GPU where they fit, blocked where it applies (same_sequence), else by rows
    REFERENCE = "reference"  # the full square of scores, in float32
    BLOCKED = "blocked"  # blocks of queries against the keys up to the block's end; the backward pass recomputes
    SPLASH = "splash"  # jax's Pallas kernels for TPU; what they do not fit is done as by "auto" elsewhere
    FLASH = "flash"  # jax's Pallas kernels for GPU; the same


def dot_product_attention(
    q_BTHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    same_sequence: bool,
    window: jax.Array | None = None,
    scale: float | None = None,
    backend: str = "auto",
    platform: str | None = None,
    context: int = 1,
) -> jax.Array:
    """Softmax attention inside a segment, at or before a query's position.

    Args:
      q_BTHN: queries; H is a multiple of K, and query head h reads KV head h // (H/K).
      k_BSKN: keys.
      v_BSKN: values, of any width.
      q_positions_BT: position of each query inside its segment.
      k_positions_BS: the same for keys.
      q_segments_BT: segment of each query; a query sees only keys of its own segment. 0 is padding.
      k_segments_BS: the same for keys.
      same_sequence: queries and keys are the same tokens in the same order (T == S, no cache), so no key after a query
        is ever visible and a back end may skip that half.
      window: how many last positions a query sees, its own included, an int32 scalar; 0 or None for all of them.
      scale: what scores are multiplied with; None for 1 / sqrt(N).
      backend: a value of AttentionBackend.
      platform: what "auto" chooses for, as jax names it ("cpu", "tpu", "gpu").
      context: devices that share the time of the tokens, which are then in the order of `context_order`.

    Returns:
      [B, T, H, width of the values] in the dtype of the queries.
    """
    chosen = AttentionBackend(backend)
    batch, time, heads, width = q_BTHN.shape
    groups = k_BSKN.shape[2]
    scale = width**-0.5 if scale is None else scale
    on_tpu = chosen is AttentionBackend.SPLASH or (chosen is AttentionBackend.AUTO and platform == "tpu")
    if context > 1 and chosen is not AttentionBackend.REFERENCE:
        tokens_BT = (q_positions_BT, q_segments_BT)
        return context_attention.attention(q_BTHN, k_BSKN, v_BSKN, tokens_BT, window, scale=scale, kernels=on_tpu)
    if on_tpu and same_sequence and window is None and splash_attention.fits(time, width, v_BSKN.shape[-1]):
        return on_each_device(
            functools.partial(splash_attention.attention, scale=scale), (q_BTHN, k_BSKN, v_BSKN), q_segments_BT
        )
    on_gpu = chosen is AttentionBackend.FLASH or (chosen is AttentionBackend.AUTO and platform == "gpu")
    flash_fits = gpu_attention.fits(time, width, v_BSKN.shape[-1], q_BTHN.dtype)
    if on_gpu and same_sequence and window is None and flash_fits:
        return on_each_device(
            functools.partial(gpu_attention.attention, scale=scale), (q_BTHN, k_BSKN, v_BSKN), q_segments_BT
        )
    masks = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, window)
    out_shape = (batch, time, heads, v_BSKN.shape[-1])
    q_BTKGN = q_BTHN.reshape(batch, time, groups, heads // groups, width)
    if chosen is AttentionBackend.REFERENCE:
        return _reference(scale, q_BTKGN, k_BSKN, v_BSKN, masks).reshape(out_shape)
    # Heads before time: the layout that batched matmuls want, so that blocks of time are slices.
    q_BKTGN, k_BKSN, v_BKSN = q_BTKGN.transpose(0, 2, 1, 3, 4), k_BSKN.swapaxes(1, 2), v_BSKN.swapaxes(1, 2)
    if same_sequence:
        out_BKTGN = _blocked(block_size(time), scale, q_BKTGN, k_BKSN, v_BKSN, masks)
    else:
        out_BKTGN = _by_rows(scale, q_BKTGN, k_BKSN, v_BKSN, masks)
    return out_BKTGN.transpose(0, 2, 1, 3, 4).reshape(out_shape)


# Positions of queries and keys, segments of both, and the window.
_Masks = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def _visible(masks: _Masks, first: int, end: int, keys: int) -> jax.Array:
    """Which of the first `keys` keys the queries [first, end) see: [B, T, S]."""
    q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, window = masks
    same_BTS = q_segments_BT[:, first:end, None] == k_segments_BS[:, None, :keys]
    q_BT1, k_B1S = q_positions_BT[:, first:end, None], k_positions_BS[:, None, :keys]
    visible_BTS = same_BTS & (q_BT1 >= k_B1S)
    if window is None:
        return visible_BTS
    return visible_BTS & ((window == 0) | (q_BT1 - k_B1S < window))


def _reference(scale: float, q_BTKGN: jax.Array, k_BSKN: jax.Array, v_BSKN: jax.Array, masks: _Masks) -> jax.Array:
    scores_BKGTS = jnp.einsum("BTKGN,BSKN->BKGTS", q_BTKGN, k_BSKN, preferred_element_type=jnp.float32)
    visible_BTS = _visible(masks, 0, q_BTKGN.shape[1], k_BSKN.shape[1])
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * scale, _MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKN.dtype)
    return jnp.einsum("BKGTS,BSKN->BTKGN", weights_BKGTS, v_BSKN)


def _by_rows(scale: float, q_BKTGN: jax.Array, k_BKSN: jax.Array, v_BKSN: jax.Array, masks: _Masks) -> jax.Array:
    """The queries of a KV group as rows of one matrix, against all keys: few queries and a long cache.

    Keys come first in their product and values last in theirs, as they lie: einsum would choose an order that transposes
    a cache in every step. A cache may have a dtype of its own.
    """
    batch, groups, time, shared, width = q_BKTGN.shape
    q_BKRN = q_BKTGN.reshape(batch, groups, time * shared, width).astype(k_BKSN.dtype)
    heads = ((0, 1), (0, 1))
    scores_BKSR = jax.lax.dot_general(k_BKSN, q_BKRN, (((3,), (3,)), heads), preferred_element_type=jnp.float32)
    scores_BKTGS = scores_BKSR.swapaxes(2, 3).reshape(batch, groups, time, shared, -1)
    visible_BTS = _visible(masks, 0, time, k_BKSN.shape[2])
    weights_BKTGS = jax.nn.softmax(jnp.where(visible_BTS[:, None, :, None], scores_BKTGS * scale, _MASKED), axis=-1)
    weights_BKRS = weights_BKTGS.reshape(batch, groups, time * shared, -1).astype(v_BKSN.dtype)
    mixed_BKRN = jax.lax.dot_general(weights_BKRS, v_BKSN, (((3,), (2,)), heads), preferred_element_type=jnp.float32)
    return mixed_BKRN.reshape(batch, groups, time, shared, -1).astype(q_BKTGN.dtype)


def latent_dot_product_attention(
    q_BTHR: jax.Array,
    q_BTHP: jax.Array,
    latent_BSR: jax.Array,
    rope_BSP: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    window: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Attention to a cache of latents, which are key and value of all heads; no head's keys are made.

    Args:
      q_BTHR: queries that read the latent.
      q_BTHP: queries that read the rotary key.
      latent_BSR: latents.
      rope_BSP: rotary keys, the same for all heads.
      q_positions_BT: as in `dot_product_attention`, like the rest.
      k_positions_BS: as there.
      q_segments_BT: as there.
      k_segments_BS: as there.
      window: as there.
      scale: as there.

    Returns:
      Mixed latents, [B, T, H, R].
    """
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BHTS = einsum("BTHR,BSR->BHTS", q_BTHR, latent_BSR) + einsum("BTHP,BSP->BHTS", q_BTHP, rope_BSP)
    masks = (q_positions_BT, k_positions_BS, q_segments_BT, k_segments_BS, window)
    visible_BTS = _visible(masks, 0, q_BTHR.shape[1], latent_BSR.shape[1])
    weights_BHTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BHTS * scale, _MASKED), axis=-1)
    return jnp.einsum("BHTS,BSR->BTHR", weights_BHTS.astype(latent_BSR.dtype), latent_BSR)


def block_size(time: int) -> int:
    """Queries per block: at most 8 blocks, which leaves 1/16 of the square to waste, of at least 64 queries."""
    return max(64, -(-time // 8))


def _blocks(block: int, time: int) -> list[tuple[int, int]]:
    return [(first, min(first + block, time)) for first in range(0, time, block)]


def _rows(x_BKTGN: jax.Array, first: int, end: int) -> jax.Array:
    """The queries [first, end) of all G heads of a KV group as rows of one matrix: [B, K, t*G, N]."""
    batch, groups, _, shared, width = x_BKTGN.shape
    return x_BKTGN[:, :, first:end].reshape(batch, groups, (end - first) * shared, width)


def _block_scores(
    scale: float, q_BKTGN: jax.Array, k_BKSN: jax.Array, masks: _Masks, first: int, end: int
) -> jax.Array:
    """Scaled and masked scores of one block, float32: [B, K, t*G, end]."""
    batch, groups, _, shared, _ = q_BKTGN.shape
    scores_BKRS = jnp.einsum(
        "BKRN,BKSN->BKRS", _rows(q_BKTGN, first, end), k_BKSN[:, :, :end], preferred_element_type=jnp.float32
    )
    split_BKTGS = (scores_BKRS * scale).reshape(batch, groups, end - first, shared, end)
    visible_BTS = _visible(masks, first, end, end)
    return jnp.where(visible_BTS[:, None, :, None, :], split_BKTGS, _MASKED).reshape(scores_BKRS.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    block: int, scale: float, q_BKTGN: jax.Array, k_BKSN: jax.Array, v_BKSN: jax.Array, masks: _Masks
) -> jax.Array:
    """Causal attention by blocks of queries; saves the output and the log of each row's sum, as FlashAttention does
    (Dao et al. 2022), and recomputes the weights in the backward pass."""
    return _blocked_forward(block, scale, q_BKTGN, k_BKSN, v_BKSN, masks)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, _Masks, jax.Array, jax.Array]


def _blocked_forward(
    block: int, scale: float, q_BKTGN: jax.Array, k_BKSN: jax.Array, v_BKSN: jax.Array, masks: _Masks
) -> tuple[jax.Array, _Residuals]:
    batch, groups, time, shared, _ = q_BKTGN.shape
    width = v_BKSN.shape[-1]
    outs, logs = [], []
    for first, end in _blocks(block, time):
        scores_BKRS = _block_scores(scale, q_BKTGN, k_BKSN, masks, first, end)
        peak_BKR1 = jnp.max(scores_BKRS, axis=-1, keepdims=True)
        weights_BKRS = jnp.exp(scores_BKRS - peak_BKR1)
        total_BKR1 = jnp.sum(weights_BKRS, axis=-1, keepdims=True)
        mixed_BKRN = jnp.einsum(
            "BKRS,BKSN->BKRN", weights_BKRS.astype(v_BKSN.dtype), v_BKSN[:, :, :end], preferred_element_type=jnp.float32
        )
        outs.append((mixed_BKRN / total_BKR1).reshape(batch, groups, end - first, shared, width))
        logs.append((peak_BKR1 + jnp.log(total_BKR1)).reshape(batch, groups, end - first, shared, 1))
    out_BKTGN = named(jnp.concatenate(outs, axis=2).astype(q_BKTGN.dtype), ATTENTION)
    return out_BKTGN, (q_BKTGN, k_BKSN, v_BKSN, masks, out_BKTGN, named(jnp.concatenate(logs, axis=2), ATTENTION))


def _blocked_backward(
    block: int, scale: float, residuals: _Residuals, dout_BKTGN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BKTGN, k_BKSN, v_BKSN, masks, out_BKTGN, log_BKTG1 = residuals
    dtype, time = q_BKTGN.dtype, q_BKTGN.shape[2]
    product = dout_BKTGN.astype(jnp.float32) * out_BKTGN.astype(jnp.float32)
    delta_BKTG1 = jnp.sum(product, axis=-1, keepdims=True)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dq: list[jax.Array] = []
    dk_BKNS = dv_BKNS = jnp.zeros((), jnp.float32)
    for first, end in _blocks(block, time):
        dout_BKRN, q_BKRN = _rows(dout_BKTGN, first, end), _rows(q_BKTGN, first, end)
        scores_BKRS = _block_scores(scale, q_BKTGN, k_BKSN, masks, first, end)
        weights_BKRS = jnp.exp(scores_BKRS - _rows(log_BKTG1, first, end))
        dweights_BKRS = einsum("BKRN,BKSN->BKRS", dout_BKRN, v_BKSN[:, :, :end])
        dscores_BKRS = (weights_BKRS * (dweights_BKRS - _rows(delta_BKTG1, first, end)) * scale).astype(dtype)
        dq_BKRN = einsum("BKRS,BKSN->BKRN", dscores_BKRS, k_BKSN[:, :, :end])
        dq.append(dq_BKRN.reshape(*dq_BKRN.shape[:2], end - first, *q_BKTGN.shape[3:]))
        # N before S: on CPU the transposed product would first copy the scores into its own layout (2.5 times as slow).
        rest = ((0, 0), (0, 0), (0, 0), (0, time - end))
        dk_BKNS += jnp.pad(einsum("BKRN,BKRS->BKNS", q_BKRN, dscores_BKRS), rest)
        dv_BKNS += jnp.pad(einsum("BKRN,BKRS->BKNS", dout_BKRN, weights_BKRS.astype(dtype)), rest)
    # The barrier keeps XLA from folding the transpose back into a single block's product.
    dk_BKNS, dv_BKNS = jax.lax.optimization_barrier((dk_BKNS, dv_BKNS))
    dk_BKSN, dv_BKSN = dk_BKNS.swapaxes(2, 3).astype(k_BKSN.dtype), dv_BKNS.swapaxes(2, 3).astype(v_BKSN.dtype)
    return jnp.concatenate(dq, axis=2).astype(dtype), dk_BKSN, dv_BKSN, None


_blocked.defvjp(_blocked_forward, _blocked_backward)
