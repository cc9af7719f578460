"""Attention while a mesh axis splits time: queries stay where they are, keys and values come to them, once a layer.

Each device gathers the keys and values of its rows and attends for its own two chunks of queries (`context_order`), on TPU
with the splash kernels, elsewhere by tiles as FlashAttention does (Dao et al. 2022): no square of scores is ever there, and
tiles that lie after a query are not computed. The gradients of keys and values are scattered back.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kwaicoder_jax.models import context_order, splash_attention
from kwaicoder_jax.models.mesh_axes import (
    CONTEXT_AXIS,
    TENSOR_AXIS,
    batch_spec,
    gathered,
    row_axes,
    token_mesh,
    weight_axis,
)
from kwaicoder_jax.models.remat import ATTENTION, named

TILE = 512  # queries and keys of a tile, at most
_MASKED = -1e30

Tokens = tuple[jax.Array, jax.Array]  # positions and segments, [B, T]


def attention(
    q_BTHN: jax.Array,
    k_BTKN: jax.Array,
    v_BTKN: jax.Array,
    tokens_BT: Tokens,
    window: jax.Array | None,
    *,
    scale: float,
    kernels: bool,
    interpret: bool = False,
) -> jax.Array:
    """As `attention_ops.dot_product_attention` of tokens to themselves, all in the order of `context_order`.

    Args:
      q_BTHN: queries.
      k_BTKN: keys.
      v_BTKN: values.
      tokens_BT: positions and segments of the tokens.
      window: as in `dot_product_attention`.
      scale: of the scores.
      kernels: whether to use the TPU kernels, where they fit.
      interpret: those kernels without a TPU, for tests.
    """
    mesh = token_mesh(q_BTHN, q_BTHN.shape[0])
    assert mesh is not None
    shards, heads = mesh.shape[CONTEXT_AXIS], weight_axis(mesh, TENSOR_AXIS, k_BTKN.shape[2])
    part, of_tokens = PartitionSpec(row_axes(mesh), CONTEXT_AXIS, heads), batch_spec(mesh)
    time, width = q_BTHN.shape[1], q_BTHN.shape[3]
    kernel, kernel_spec = None, None
    if kernels and window is None and splash_attention.fits(time, width, v_BTKN.shape[3], shards):
        own_heads = q_BTHN.shape[2] // (1 if heads is None else mesh.shape[heads])
        kernel, kernel_spec = splash_attention.sharded_kernel(time, own_heads, mesh, CONTEXT_AXIS, interpret)

    def local(q_BTHN, k_BTKN, v_BTKN, tokens_BT, window, kernel):
        k_BSKN, v_BSKN = (_whole_rows(x, shards) for x in (k_BTKN, v_BTKN))
        all_BT = (jax.lax.all_gather(x_BT, CONTEXT_AXIS, axis=1, tiled=True) for x_BT in tokens_BT)
        keys_BS = tuple(context_order.in_time(x_BT, shards) for x_BT in all_BT)
        if kernel is not None:
            segments = (tokens_BT[1], keys_BS[1])
            return splash_attention.run(kernel, q_BTHN, k_BSKN, v_BSKN, segments, scale=scale)
        return _by_tiles(scale, shards, q_BTHN, k_BSKN, v_BSKN, (*tokens_BT, *keys_BS, window))

    return jax.shard_map(
        local, mesh=mesh, in_specs=(part, part, part, of_tokens, PartitionSpec(), kernel_spec), out_specs=part,
        check_vma=False,
    )(q_BTHN, k_BTKN, v_BTKN, tokens_BT, window, kernel)  # fmt: skip


def _whole_rows(x_BTKN: jax.Array, shards: int) -> jax.Array:
    """Keys or values of all devices, in the order of time; their gradients are scattered back.

    With heads and width as one axis: libtpu 0.0.42 writes the scatter of an array [B, T, K, N] as an all-reduce.
    """
    x_BTJ = x_BTKN.reshape(*x_BTKN.shape[:2], -1)
    return context_order.in_time(gathered(x_BTJ, CONTEXT_AXIS, 1), shards).reshape(
        x_BTKN.shape[0], -1, *x_BTKN.shape[2:]
    )


def pairs(time: int, shards: int) -> tuple[int, np.ndarray]:
    """The size of a tile, and which tiles of queries and keys each device multiplies: [C, P, 2], P the same for all.

    Tiles of queries count on the device, those of keys in the row; a tile of queries takes keys up to its own, its own last.
    """
    chunk = time // (2 * shards)
    tile = max(size for size in range(1, min(TILE, chunk) + 1) if chunk % size == 0)
    places = context_order.order(time // tile, shards).reshape(shards, -1)
    found = [[(own, key) for own, place in enumerate(row) for key in range(place + 1)] for row in places]
    return tile, np.array(found, np.int32)


# Positions and segments of queries and of keys, and the window.
_Masks = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]


def _by_tiles(
    scale: float, shards: int, q_BTHN: jax.Array, k_BSKN: jax.Array, v_BSKN: jax.Array, masks: _Masks
) -> jax.Array:
    """One device's queries against all keys, inside the shard_map."""
    batch, time, heads, width = q_BTHN.shape
    groups = k_BSKN.shape[2]
    tile, of_devices = pairs(k_BSKN.shape[1], shards)
    pairs_P2 = jnp.asarray(of_devices)[jax.lax.axis_index(CONTEXT_AXIS)]
    # Tiles first; then the queries of a KV group are rows of one matrix: [tiles, B, K, tile * G, N].
    q_IBKRN = q_BTHN.reshape(batch, time // tile, tile, groups, heads // groups, width).transpose(1, 0, 3, 2, 4, 5)
    q_IBKRN = q_IBKRN.reshape(*q_IBKRN.shape[:3], -1, width)
    k_JBKSN, v_JBKSN = (
        x.reshape(batch, -1, tile, groups, x.shape[-1]).transpose(1, 0, 3, 2, 4) for x in (k_BSKN, v_BSKN)
    )
    *of_tokens, window = masks
    tiled = tuple(x.reshape(batch, -1, tile).swapaxes(0, 1) for x in of_tokens)
    out_IBKRN = _tiles(scale, heads // groups, q_IBKRN, k_JBKSN, v_JBKSN, (*tiled, window), pairs_P2)
    out_IBKtGN = out_IBKRN.reshape(*out_IBKRN.shape[:3], tile, heads // groups, -1)
    return out_IBKtGN.transpose(1, 0, 3, 2, 4, 5).reshape(batch, time, heads, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiles(scale, shared, q_IBKRN, k_JBKSN, v_JBKSN, masks, pairs_P2):
    return _tiles_forward(scale, shared, q_IBKRN, k_JBKSN, v_JBKSN, masks, pairs_P2)[0]


def _scores(scale: float, shared: int, q_BKRN: jax.Array, k_BKSN: jax.Array, masks: _Masks) -> jax.Array:
    """Scaled and masked scores of one tile, float32; the `shared` query heads of a token are neighbours among the rows."""
    q_positions_BT, q_segments_BT, k_positions_BS, k_segments_BS, window = masks
    distance_BTS = q_positions_BT[:, :, None] - k_positions_BS[:, None, :]
    visible_BTS = (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & (distance_BTS >= 0)
    if window is not None:
        visible_BTS &= (window == 0) | (distance_BTS < window)
    scores_BKRS = jnp.einsum("BKRN,BKSN->BKRS", q_BKRN, k_BKSN, preferred_element_type=jnp.float32) * scale
    return jnp.where(jnp.repeat(visible_BTS, shared, axis=1)[:, None], scores_BKRS, _MASKED)


def _at(masks: _Masks, own: jax.Array, key: jax.Array) -> _Masks:
    q_positions, q_segments, k_positions, k_segments, window = masks
    return q_positions[own], q_segments[own], k_positions[key], k_segments[key], window


def _tiles_forward(scale, shared, q_IBKRN, k_JBKSN, v_JBKSN, masks, pairs_P2):
    def step(sums, pair):
        (own, key), (out_IBKRN, total_IBKR1, peak_IBKR1) = pair, sums
        scores_BKRS = _scores(scale, shared, q_IBKRN[own], k_JBKSN[key], _at(masks, own, key))
        # A query's own tile comes last, where it sees itself at least: what a tile without any key left is wiped out.
        peak_BKR1 = jnp.maximum(peak_IBKR1[own], jnp.max(scores_BKRS, axis=-1, keepdims=True))
        weights_BKRS, decay_BKR1 = jnp.exp(scores_BKRS - peak_BKR1), jnp.exp(peak_IBKR1[own] - peak_BKR1)
        mixed_BKRN = jnp.einsum(
            "BKRS,BKSN->BKRN", weights_BKRS.astype(v_JBKSN.dtype), v_JBKSN[key], preferred_element_type=jnp.float32
        )
        total_BKR1 = decay_BKR1 * total_IBKR1[own] + jnp.sum(weights_BKRS, axis=-1, keepdims=True)
        new = (decay_BKR1 * out_IBKRN[own] + mixed_BKRN, total_BKR1, peak_BKR1)
        return tuple(x.at[own].set(tile) for x, tile in zip(sums, new)), None

    rows = q_IBKRN.shape[:-1]
    start = (
        jnp.zeros((*rows, v_JBKSN.shape[-1]), jnp.float32),
        jnp.zeros((*rows, 1), jnp.float32),
        jnp.full((*rows, 1), _MASKED, jnp.float32),
    )
    (out_IBKRN, total_IBKR1, peak_IBKR1), _ = jax.lax.scan(step, start, (pairs_P2[:, 0], pairs_P2[:, 1]))
    out_IBKRN = named((out_IBKRN / total_IBKR1).astype(q_IBKRN.dtype), ATTENTION)
    log_IBKR1 = named(peak_IBKR1 + jnp.log(total_IBKR1), ATTENTION)
    return out_IBKRN, (q_IBKRN, k_JBKSN, v_JBKSN, masks, pairs_P2, out_IBKRN, log_IBKR1)


def _tiles_backward(scale, shared, residuals, dout_IBKRN):
    q_IBKRN, k_JBKSN, v_JBKSN, masks, pairs_P2, out_IBKRN, log_IBKR1 = residuals
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    product = dout_IBKRN.astype(jnp.float32) * out_IBKRN.astype(jnp.float32)
    delta_IBKR1 = jnp.sum(product, axis=-1, keepdims=True)

    def step(sums, pair):
        (own, key), (dq_IBKRN, dk_JBKSN, dv_JBKSN) = pair, sums
        q_BKRN, k_BKSN, dout_BKRN = q_IBKRN[own], k_JBKSN[key], dout_IBKRN[own]
        weights_BKRS = jnp.exp(_scores(scale, shared, q_BKRN, k_BKSN, _at(masks, own, key)) - log_IBKR1[own])
        dweights_BKRS = einsum("BKRN,BKSN->BKRS", dout_BKRN, v_JBKSN[key])
        dscores_BKRS = (weights_BKRS * (dweights_BKRS - delta_IBKR1[own]) * scale).astype(q_IBKRN.dtype)
        dq_IBKRN = dq_IBKRN.at[own].add(einsum("BKRS,BKSN->BKRN", dscores_BKRS, k_BKSN))
        dk_JBKSN = dk_JBKSN.at[key].add(einsum("BKRS,BKRN->BKSN", dscores_BKRS, q_BKRN))
        weights_BKRS = weights_BKRS.astype(q_IBKRN.dtype)
        return (dq_IBKRN, dk_JBKSN, dv_JBKSN.at[key].add(einsum("BKRS,BKRN->BKSN", weights_BKRS, dout_BKRN))), None

    arrays = (q_IBKRN, k_JBKSN, v_JBKSN)
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in arrays)
    gradients, _ = jax.lax.scan(step, start, (pairs_P2[:, 0], pairs_P2[:, 1]))
    return (*(d.astype(x.dtype) for d, x in zip(gradients, arrays)), None, None)


_tiles.defvjp(_tiles_forward, _tiles_backward)
