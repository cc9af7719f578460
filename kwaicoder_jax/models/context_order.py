"""Context parallelism: the order of a row's tokens while a mesh axis splits its time.

Causal attention gives the later tokens of a row more to do. Time is therefore cut into two chunks for each of C devices,
and device c holds chunks c and 2C - 1 - c: all have the same work (as Llama 3 does, arXiv 2407.21783, section 3.3.2). A
forward pass brings its tokens into this order, and what it returns back; outside of it time is in order.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.models.mesh_axes import CONTEXT_AXIS, batch_spec, context_shares, token_mesh


def shards(x_BT: jax.Array) -> int:
    """Devices that share the time of these rows; 1 where it is not split, or does not make two chunks for each."""
    found = context_shares(token_mesh(x_BT, x_BT.shape[0]))
    return 1 if x_BT.shape[1] % (2 * found) else found


def multiple(shards: int, platform: str) -> int:
    """What a sequence's length has to be a multiple of, so that so many devices can share it."""
    lanes = 128 if platform == "tpu" else 1  # of the kernels, see `splash_attention.LANES`
    return 1 if shards == 1 else 2 * shards * lanes


def order(time: int, shards: int) -> np.ndarray:
    """Where each token of the balanced order stands in its row: [T] int32, a permutation."""
    chunks = np.arange(time, dtype=np.int32).reshape(2 * shards, -1)
    return np.stack([chunks[:shards], chunks[: shards - 1 : -1]], axis=1).reshape(-1)


def balanced(x_BT: jax.Array) -> jax.Array:
    """Tokens [B, T, ...] from the order of time into the balanced one; each device sends its two chunks on."""
    return _on_each_device(_balance, x_BT)


def restored(x_BT: jax.Array) -> jax.Array:
    """The inverse of `balanced`."""
    return _on_each_device(_restore, x_BT)


def in_time(x_BT: jax.Array, shards: int) -> jax.Array:
    """All tokens of the balanced order back in that of time, on one device."""
    batch, time, *rest = x_BT.shape
    x_BC2t = x_BT.reshape(batch, shards, 2, time // (2 * shards), *rest)
    return jnp.concatenate([x_BC2t[:, :, 0], x_BC2t[:, ::-1, 1]], axis=1).reshape(x_BT.shape)


def _on_each_device(function, x_BT: jax.Array) -> jax.Array:
    mesh = token_mesh(x_BT, x_BT.shape[0])
    assert mesh is not None
    spec = batch_spec(mesh)
    return jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x_BT)


def _homes(parity: int) -> list[tuple[int, int]]:
    """(device, where it sends its chunk): in time order device c has chunks 2c and 2c + 1."""
    count = jax.lax.axis_size(CONTEXT_AXIS)
    chunks = range(parity, 2 * count, 2)
    return [(chunk // 2, chunk if chunk < count else 2 * count - 1 - chunk) for chunk in chunks]


def _balance(x_BT: jax.Array) -> jax.Array:
    even, odd = (
        jax.lax.ppermute(half, CONTEXT_AXIS, _homes(parity)) for parity, half in enumerate(jnp.split(x_BT, 2, axis=1))
    )
    return jnp.concatenate(_turned(even, odd), axis=1)


def _restore(x_BT: jax.Array) -> jax.Array:
    halves = _turned(*jnp.split(x_BT, 2, axis=1))
    back = ([(there, here) for here, there in _homes(parity)] for parity in (0, 1))
    return jnp.concatenate([jax.lax.ppermute(x, CONTEXT_AXIS, pairs) for x, pairs in zip(halves, back)], axis=1)


def _turned(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two on an even device, changed about on an odd one: the chunk that it holds first is an odd one."""
    odd = jax.lax.axis_index(CONTEXT_AXIS) % 2 == 1
    return jnp.where(odd, second, first), jnp.where(odd, first, second)
