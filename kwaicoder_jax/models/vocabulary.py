"""The vocabulary projection and the losses fused with it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kwaicoder_jax.models.vocabulary_sharding import on_each_device


def projection(params: Any) -> jax.Array:
    """The matrix from hidden states to logits, [V, D]: the head, or the embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden_BTD: jax.Array, projection_VD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V]; for short inputs and tests, since training never needs the whole array."""
    return jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, projection_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )


def cross_entropy(
    hidden_BTD: jax.Array,
    projection_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    scatter_stage: int = 0,
) -> jax.Array:
    """Sum over positions of mask * (-log softmax(hidden . projection)[target]), float32, nats.

    The logits are made in chunks of the time axis and dropped; when a gradient is wanted, each chunk's is computed
    while its logits are there, so nothing is computed twice and no [B, T, V] array is ever live.

    Args:
      hidden_BTD: final hidden states.
      projection_VD: from hidden states to logits.
      targets_BT: a token for each position.
      mask_BT: weight of each position.
      scatter_stage: on a mesh, see `Runtime.scatter_stage`.
    """
    return _cross_entropy(scatter_stage, hidden_BTD, projection_VD, targets_BT, mask_BT.astype(jnp.float32))


_CHUNK = 2**22  # logits of one chunk: 16 MiB of float32, measured on CPU (half and twice as much are slower)
_MOST_CHUNKS = 16  # every chunk adds to a gradient as large as the projection


def _split(x_BT: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] to [chunks, B, T / chunks, ...], padded with zeros where T does not divide."""
    batch, time = x_BT.shape[:2]
    size = -(-time // chunks)
    padding = [(0, 0), (0, size * chunks - time)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, padding).reshape(batch, chunks, size, *x_BT.shape[2:]).swapaxes(0, 1)


def _join(x_CBT: jax.Array, time: int) -> jax.Array:
    """The inverse of `_split`."""
    chunks, batch, size = x_CBT.shape[:3]
    return x_CBT.swapaxes(0, 1).reshape(batch, chunks * size, *x_CBT.shape[3:])[:, :time]


def _chunked(
    stage: int, hidden_BTD: jax.Array, projection_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array, *,
    gradients: bool,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """-log p of each target, [B, T]; with `gradients` also those of the masked sum by hidden and projection."""
    local = functools.partial(_on_one_device, gradients=gradients)
    tokens, projections = (hidden_BTD, targets_BT, mask_BT), (projection_VD.astype(hidden_BTD.dtype),)
    (loss_BT, dhidden_BTD), sums = on_each_device(
        local, tokens, projections, sums=int(gradients), stage=stage
    )  # fmt: skip
    return loss_BT, (dhidden_BTD, *sums)


def _on_one_device(
    tokens: Sequence[jax.Array], projections: Sequence[jax.Array], vocab_axis: str | None, *, gradients: bool
) -> tuple[Any, Sequence[jax.Array]]:
    """See `vocabulary_sharding.LocalLoss`; without `gradients` there is no sum."""
    (hidden_BTD, targets_BT, _), (matrix_VD,) = tokens, projections
    batch, time, width = hidden_BTD.shape
    vocab, dtype = matrix_VD.shape[0], hidden_BTD.dtype
    chunks = min(_MOST_CHUNKS, time, -(-batch * time * vocab // _CHUNK))
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    first = 0 if vocab_axis is None else vocab * jax.lax.axis_index(vocab_axis)
    vocab_V11 = first + jnp.arange(vocab, dtype=targets_BT.dtype)[:, None, None]

    def over_vocabulary(reduce: Callable[..., jax.Array], x_Bt: jax.Array) -> jax.Array:
        return x_Bt if vocab_axis is None else reduce(x_Bt, vocab_axis)

    def chunk(total_VD: Any, inputs: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        hidden_BtD, targets_Bt, mask_Bt = inputs
        # Vocabulary first: then the large matrix is never the transposed operand of a product, which XLA on CPU would
        # copy before each (1.4 times the time of the whole loss).
        logits_VBt = einsum("VD,BtD->VBt", matrix_VD, hidden_BtD)
        hit_VBt = vocab_V11 == targets_Bt[None]
        peak_Bt = over_vocabulary(jax.lax.pmax, jnp.max(logits_VBt, axis=0))
        weights_VBt = jnp.exp(logits_VBt - peak_Bt[None])
        sum_Bt = over_vocabulary(jax.lax.psum, jnp.sum(weights_VBt, axis=0))
        target_Bt = over_vocabulary(jax.lax.psum, jnp.sum(jnp.where(hit_VBt, logits_VBt, 0.0), axis=0))
        loss_Bt = peak_Bt + jnp.log(sum_Bt) - target_Bt
        if not gradients:
            return total_VD, (loss_Bt, None)
        dlogits_VBt = weights_VBt * (mask_Bt / sum_Bt)[None] - jnp.where(hit_VBt, mask_Bt[None], 0.0)
        dlogits_VBt = dlogits_VBt.astype(dtype)
        # No float32 result here: XLA on CPU has no bfloat16 product of that kind in this layout.
        dhidden_DBt = over_vocabulary(jax.lax.psum, jnp.einsum("VD,VBt->DBt", matrix_VD, dlogits_VBt))
        return total_VD + einsum("VBt,BtD->VD", dlogits_VBt, hidden_BtD), (loss_Bt, dhidden_DBt)

    parts = tuple(_split(x, chunks) for x in tokens)
    start_VD: Any = jnp.zeros((vocab, width), jnp.float32) if gradients else None
    total_VD, (loss_CBt, dhidden_CDBt) = jax.lax.scan(chunk, start_VD, parts)
    loss_BT = _join(loss_CBt, time)
    if not gradients:
        return (loss_BT, None), []
    return (loss_BT, _join(dhidden_CDBt.transpose(0, 2, 3, 1), time)), [total_VD]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    stage: int, hidden_BTD: jax.Array, projection_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    loss_BT, _ = _chunked(stage, hidden_BTD, projection_VD, targets_BT, mask_BT, gradients=False)
    return jnp.sum(mask_BT * loss_BT)


def _forward(
    stage: int, hidden_BTD: jax.Array, projection_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array
) -> tuple[jax.Array, Any]:
    loss_BT, gradients = _chunked(stage, hidden_BTD, projection_VD, targets_BT, mask_BT, gradients=True)
    dtype_of_projection = jnp.zeros((), projection_VD.dtype)
    return jnp.sum(mask_BT * loss_BT), (*gradients, loss_BT, dtype_of_projection)


def _backward(stage: int, residuals: Any, scale: jax.Array) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    del stage
    dhidden_BTD, dprojection_VD, loss_BT, like = residuals
    dhidden = (dhidden_BTD * scale).astype(dhidden_BTD.dtype)
    return dhidden, (dprojection_VD * scale).astype(like.dtype), None, loss_BT * scale


_cross_entropy.defvjp(_forward, _backward)
