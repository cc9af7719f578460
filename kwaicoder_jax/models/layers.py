"""The small modules that attention and MLP stand on: declared parameters, RMSNorm, rotary embedding, dense SwiGLU."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwaicoder_jax.models.config import ModelConfig
from kwaicoder_jax.models.statistics import energy_share, record, recording, store

Initializer = Callable[..., jax.Array]


def declare(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, dtype: str
) -> jax.Array:
    """Declares one parameter, once: shape, dtype, initialiser and logical axes.

    Everything else (mesh sharding, checkpoint layout, weight decay, every transform) reads `models.declarations`.
    """
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))
    return value  # Linen unboxes it


def project(x: jax.Array, weight: jax.Array, inner: int = 1) -> jax.Array:
    """Contracts the last `inner` axes of `x` with the first `inner` axes of `weight`, as one product of two matrices.

    The naive equivalent is an einsum over [B, T, ...]; the gradient of the weight then contracts two axes at once, which
    XLA on CPU does at less than half the speed of the flat product.
    """
    outer, last = x.shape[: x.ndim - inner], weight.shape[inner:]
    depth = math.prod(weight.shape[:inner])
    return (x.reshape(-1, depth) @ weight.astype(x.dtype).reshape(depth, -1)).reshape(*outer, *last)


class RMSNorm(nn.Module):
    """y = x / rms(x) * scale, in float32 (Zhang and Sennrich 2019)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        scale_D = declare(self, "scale", (x_BTD.shape[-1],), ("embed",), nn.initializers.ones, self.config.param_dtype)
        x32_BTD = x_BTD.astype(jnp.float32)
        energy_BT1 = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
        y_BTD = x32_BTD * jax.lax.rsqrt(energy_BT1 + self.config.norm_epsilon)
        y_BTD = y_BTD * scale_D.astype(jnp.float32)[None, None, :]
        record(self, "channels", y_BTD, mask_BT)
        if recording(self):
            store(self, "energy", energy_share(x32_BTD, mask_BT))
        return y_BTD.astype(self.config.dtype)


def rotary(x_BTHN: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotates pairs (i, i + N/2) of each head by position times theta^(-2i/N) (Su et al. 2021, in the Llama layout)."""
    half = x_BTHN.shape[-1] // 2
    frequency_P = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1P = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_P[None, None, None, :]
    cos, sin = jnp.cos(angle_BT1P), jnp.sin(angle_BT1P)
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020); `axis` is the logical name of its `width` neurons."""

    config: ModelConfig
    width: int
    axis: str = "mlp"

    @nn.compact
    def __call__(self, x_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        out_init = nn.initializers.normal(c.initializer_range / (2 * c.layers) ** 0.5)
        gate_DF = declare(self, "gate", (c.model_dim, self.width), ("embed", self.axis), init, c.param_dtype)
        up_DF = declare(self, "up", (c.model_dim, self.width), ("embed", self.axis), init, c.param_dtype)
        down_FD = declare(self, "down", (self.width, c.model_dim), (self.axis, "embed"), out_init, c.param_dtype)
        a_BTF = nn.silu(project(x_BTD, gate_DF)) * project(x_BTD, up_DF)
        record(self, "neurons", a_BTF, mask_BT)
        return project(a_BTF, down_FD)
