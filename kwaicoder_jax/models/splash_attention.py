"""Attention on TPU: jax's Pallas kernels (splash attention), one call a row, on each device's rows and heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from kwaicoder_jax.models import context_order
from kwaicoder_jax.models.remat import ATTENTION

LANES = 128
BLOCK = 1024  # queries and keys of a block, the last one of each row of blocks half in vain


def fits(time: int, width: int, value_width: int, shards: int = 1) -> bool:
    """Whether the kernels take sequences of `time` and heads of these widths, if so many devices share the time."""
    chunks = 1 if shards == 1 else 2 * shards
    return time % (chunks * LANES) == 0 and width % LANES == 0 and value_width % LANES == 0


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
    return run(kernel, q_BTHN, k_BTKN, v_BTKN, (segments_BT, segments_BT), scale=scale)


def run(
    kernel: kernels.SplashAttentionKernel,
    q_BTHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    segments: tuple[jax.Array, jax.Array],
    *,
    scale: float,
) -> jax.Array:
    """A kernel on all rows; `segments` are those of queries and of keys."""
    q_BHTN = (q_BTHN * jnp.asarray(scale, q_BTHN.dtype)).swapaxes(1, 2)
    k_BKSN, v_BKSN = k_BSKN.swapaxes(1, 2), v_BSKN.swapaxes(1, 2)
    out_BHTN: Any = jax.vmap(kernel)(q_BHTN, k_BKSN, v_BKSN, kernels.SegmentIds(*segments))
    return out_BHTN.swapaxes(1, 2)


def sharded_kernel(time: int, heads: int, mesh: AbstractMesh, axis: str, interpret: bool = False) -> tuple[Any, Any]:
    """The kernel for rows whose queries `axis` splits, in the order of `context_order`, and its specs for a shard_map.

    Args:
      time: of whole rows; keys and values are whole, and in the order of time.
      heads: on one device.
      mesh: that has the axis.
      axis: of the mesh.
      interpret: for tests without a TPU.
    """
    kernel = _kernel(time, heads, interpret, mesh.shape[axis])
    return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))  # type: ignore[arg-type]


def work(
    batch: int, heads: int, time: int, width: int, itemsize: int, *, backward: bool, keys: int | None = None
) -> tuple[float, float]:
    """FLOPs and bytes of HBM of one call: two products a block, five in the backward pass, over the blocks that causal
    attention touches; a block of queries reads the keys and values before it.

    With `keys`, queries are an even share of so many tokens, see `context_order`.
    """
    keys = keys or time
    block = block_size(keys, keys // time)
    blocks = keys // block
    touched = time / keys * blocks * (blocks + 1) / 2 * block**2
    products, arrays = (5, 8 + 2 * blocks) if backward else (2, 4 + blocks)
    return 2.0 * products * batch * heads * touched * width, float(batch * heads * time * width * itemsize * arrays)


def block_size(time: int, shards: int = 1) -> int:
    """The largest block up to BLOCK that divides the sequence, or each chunk of it where devices share it."""
    chunk = time if shards == 1 else time // (2 * shards)
    return max(size for size in range(LANES, min(BLOCK, chunk) + 1, LANES) if chunk % size == 0)


@functools.lru_cache(maxsize=16)
def _kernel(time: int, heads: int, interpret: bool, shards: int = 1) -> kernels.SplashAttentionKernel:
    block = block_size(time, shards)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=min(block, 512), block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
    )  # fmt: skip
    causal = masks.CausalMask((time, time))
    if shards > 1:
        causal.q_sequence = context_order.order(time, shards)
    mask = masks.MultiHeadMask([causal] * heads)
    with jax.ensure_compile_time_eval():
        return kernels.make_splash_mha(
            mask,
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name=ATTENTION,
            interpret=interpret,
        )
