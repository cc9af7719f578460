"""Attention on TPU: jax's Pallas kernels (splash attention), one call a row, on each device's rows and heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kwaicoder_jax.models.remat import ATTENTION

LANES = 128
BLOCK = 1024  # queries and keys of a block, the last one of each row of blocks half in vain


def fits(time: int, width: int, value_width: int) -> bool:
    """Whether the kernels take sequences of `time` and heads of these widths."""
    return time % LANES == 0 and width % LANES == 0 and value_width % LANES == 0


def attention(
    q_BTHN: jax.Array,
    k_BTKN: jax.Array,
    v_BTKN: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention inside a segment, [B, T, H, width of the values]; arguments as in `dot_product_attention`."""
    kernel = _kernel(q_BTHN.shape[1], q_BTHN.shape[2], interpret)
    q_BHTN = (q_BTHN * jnp.asarray(scale, q_BTHN.dtype)).swapaxes(1, 2)
    k_BKTN, v_BKTN = k_BTKN.swapaxes(1, 2), v_BTKN.swapaxes(1, 2)
    segments = kernels.SegmentIds(segments_BT, segments_BT)
    out_BHTN: Any = jax.vmap(kernel)(q_BHTN, k_BKTN, v_BKTN, segments)
    return out_BHTN.swapaxes(1, 2)


def work(batch: int, heads: int, time: int, width: int, itemsize: int, *, backward: bool) -> tuple[float, float]:
    """FLOPs and bytes of HBM of one call: two products a block, five in the backward pass, over the blocks that causal
    attention touches; a block of queries reads the keys and values before it."""
    blocks = time // block_size(time)
    touched = blocks * (blocks + 1) / 2 * block_size(time) ** 2
    products, arrays = (5, 8 + 2 * blocks) if backward else (2, 4 + blocks)
    return 2.0 * products * batch * heads * touched * width, float(batch * heads * time * width * itemsize * arrays)


def block_size(time: int) -> int:
    """The largest block up to BLOCK that divides the sequence."""
    return max(size for size in range(LANES, min(BLOCK, time) + 1, LANES) if time % size == 0)


@functools.lru_cache(maxsize=16)
def _kernel(time: int, heads: int, interpret: bool) -> kernels.SplashAttentionKernel:
    block = block_size(time)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512), block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((time, time)) for _ in range(heads)])
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
