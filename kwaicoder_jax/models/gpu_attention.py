"""Attention on GPU: jax's Pallas kernels (FlashAttention for Triton, `jax.experimental.pallas.ops.gpu.attention`).

They know segments, causality and a backward pass, but no groups of heads: keys and values are repeated for each of a
group's queries, and their gradients added up. cuDNN's fused attention is not used: jax looks for the cuDNN of the machine
that traces, and documents in a row would have a greatest number. Nor is jax's Mosaic GPU attention, which knows no
segments and has no causal backward pass.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

from kwaicoder_jax.models.remat import ATTENTION, named

BLOCK = 128  # queries of a block forward; a sequence is a multiple of it
BACKWARD_BLOCK = 64
WIDTHS = (64, 128)


def fits(time: int, width: int, value_width: int, dtype: Any) -> bool:
    """Whether the kernels take sequences of `time` and heads of these widths; of float32 they would keep 10 bits."""
    return (
        time % BLOCK == 0 and width in WIDTHS and width == value_width and dtype in (jnp.bfloat16, jnp.float16)
    )  # fmt: skip


def attention(
    q_BTHN: jax.Array,
    k_BTKN: jax.Array,
    v_BTKN: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention inside a segment, [B, T, H, N]; arguments as in `dot_product_attention`."""
    shared = q_BTHN.shape[2] // k_BTKN.shape[2]
    k_BTHN, v_BTHN = (jnp.repeat(x, shared, axis=2) for x in (k_BTKN, v_BTKN))
    return _attention(scale, interpret, q_BTHN, k_BTHN, v_BTHN, segments_BT)


def work(batch: int, heads: int, time: int, width: int, itemsize: int, *, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes of HBM of one call, over the blocks that causal attention touches.

    Two products a block forward. Backward seven: the kernel computes scores and their gradients twice, for the keys'
    gradients and for the queries'. A sequence's keys and values stay in L2.
    """
    block = BACKWARD_BLOCK if backward else BLOCK
    touched = time * (time + block) / 2
    products, arrays = (7, 7) if backward else (2, 4)
    return 2.0 * products * batch * heads * touched * width, float(batch * heads * time * width * itemsize * arrays)


def _sizes() -> kernels.BlockSizes:
    back = BACKWARD_BLOCK
    return kernels.BlockSizes(
        block_q=BLOCK, block_k=64, block_q_dkv=back, block_kv_dkv=back, block_q_dq=back, block_kv_dq=back
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    scale: float, interpret: bool, q_BTHN: jax.Array, k_BTHN: jax.Array, v_BTHN: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    return _forward(scale, interpret, q_BTHN, k_BTHN, v_BTHN, segments_BT)[0]


def _forward(
    scale: float, interpret: bool, q_BTHN: jax.Array, k_BTHN: jax.Array, v_BTHN: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, Any]:
    out_BTHN, log_BHT = kernels.mha(
        q_BTHN, k_BTHN, v_BTHN, segments_BT, sm_scale=scale, causal=True, block_sizes=_sizes(), interpret=interpret,
        return_residuals=True,
    )  # fmt: skip
    out_BTHN, log_BHT = named(out_BTHN, ATTENTION), named(log_BHT, ATTENTION)
    return out_BTHN, (q_BTHN, k_BTHN, v_BTHN, segments_BT, out_BTHN, log_BHT)


def _backward(scale: float, interpret: bool, residuals: Any, dout_BTHN: jax.Array) -> tuple[jax.Array | None, ...]:
    # The rule of `kernels.mha`, whose residuals would have no name for a policy to keep.
    return kernels._mha_backward(
        scale, True, _sizes(), "triton", None, 2, None, interpret, False, False, residuals, dout_BTHN
    )


_attention.defvjp(_forward, _backward)
