"""The small modules that attention and MLP stand on: declared parameters, RMSNorm, dense SwiGLU."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from kernels.grouped_matmul import PROJECTIONS, ScaledMatrices
from kwaicoder_jax.models import quantization
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.mesh_axes import (
    EMBED_AXIS,
    TENSOR_AXIS,
    batch_spec,
    context_shares,
    flat,
    gathered,
    token_mesh,
    unflat,
    weight_axis,
)
from kwaicoder_jax.models.quantization import Quantization
from kwaicoder_jax.models.remat import named
from kwaicoder_jax.models.statistics import energy_share, record, recording, store
from kwaicoder_jax.models.stored import StoredMatrix

Initializer = Callable[..., jax.Array]


def declare(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, dtype: str
) -> jax.Array:
    """Declares one parameter, once: shape, dtype, initialiser and logical axes.

    Everything else (mesh sharding, checkpoint layout, weight decay, every transform) reads `models.declarations`.
    """
    given: Any = module.get_variable("params", name)
    if isinstance(given, StoredMatrix | ScaledMatrices):  # has not the declared shape, which Linen would check
        return given  # type: ignore[return-value]
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.dtype(dtype))
    return value  # Linen unboxes it


def declare_bias(
    module: nn.Module, name: str, shape: int | tuple[int, ...], axes: str | tuple[str, ...], config: ModelConfig
) -> jax.Array:
    """Declares a bias, zero at first; its name ends in "bias", which is what `Declaration.kind` goes by."""
    shape = (shape,) if isinstance(shape, int) else shape
    axes = (axes,) if isinstance(axes, str) else axes
    return declare(module, name, shape, axes, nn.initializers.zeros, config.param_dtype)


def plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """`x` with the bias on its last axes, if there is one."""
    return x if bias is None else x + bias.astype(x.dtype)[(None,) * (x.ndim - bias.ndim)]


def project(
    x: jax.Array, weight: jax.Array | StoredMatrix, inner: int = 1, runtime: Runtime | None = None, *,
    channels: int | None = None,
) -> jax.Array:  # fmt: skip
    """Contracts the last `inner` axes of `x` with the first `inner` axes of `weight`, as one product of two matrices.

    In 8 bits where `runtime` says so. With `runtime.scatter_stage` the dimension of `weight` that has the `channels` is
    gathered here, and its gradient scattered in stages: on machines that need stages XLA does both by sums.

    The naive equivalent is an einsum over [B, T, ...]; the gradient of the weight then contracts two axes at once, which
    XLA on CPU does at less than half the speed of the flat product.
    """
    if isinstance(weight, StoredMatrix):
        return weight.project(x, inner)
    outer, last = x.shape[: x.ndim - inner], weight.shape[inner:]
    mesh = token_mesh(x, outer[0]) if len(outer) == 2 else None
    if mesh is not None and channels is not None and runtime is not None and _in_stages(mesh, runtime):
        return _project_in_stages(mesh, x, weight, inner, runtime, channels % weight.ndim)
    depth = math.prod(weight.shape[:inner])
    matrix_JF = weight.astype(x.dtype).reshape(depth, -1)
    if context_shares(mesh) > 1:  # a plain reshape of rows whose time is split would gather them
        y_MF = _times(flat(x, mesh).reshape(-1, depth), matrix_JF, runtime)
        return unflat(y_MF, outer[0], mesh).reshape(*outer, *last)
    return _times(x.reshape(-1, depth), matrix_JF, runtime).reshape(*outer, *last)


def _in_stages(mesh: AbstractMesh, runtime: Runtime) -> bool:
    return runtime.scatter_stage > 0 and context_shares(mesh) == 1 and mesh.shape.get(TENSOR_AXIS, 1) == 1


def _project_in_stages(
    mesh: AbstractMesh, x: jax.Array, weight: jax.Array, inner: int, runtime: Runtime, dimension: int
) -> jax.Array:
    """`project` of rows that the mesh splits, with a weight of which it splits that dimension."""
    axis = weight_axis(mesh, EMBED_AXIS, weight.shape[dimension])

    def local(x: jax.Array, weight: jax.Array) -> jax.Array:
        whole = gathered(weight.astype(x.dtype), axis, dimension, runtime.scatter_stage)
        depth = math.prod(whole.shape[:inner])
        y_MF = _times(x.reshape(-1, depth), whole.reshape(depth, -1), runtime)
        return y_MF.reshape(*x.shape[:2], *whole.shape[inner:])

    rows, spec = batch_spec(mesh), PartitionSpec(*(axis if d == dimension else None for d in range(weight.ndim)))
    return jax.shard_map(local, mesh=mesh, in_specs=(rows, spec), out_specs=rows, check_vma=False)(x, weight)


def _times(x_MJ: jax.Array, matrix_JF: jax.Array, runtime: Runtime | None) -> jax.Array:
    if runtime is None or runtime.quantization is Quantization.NONE:
        return x_MJ @ matrix_JF
    return quantization.product(x_MJ, matrix_JF, runtime.quantization, runtime.quantize_gradients)


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


class InnerNorm(nn.Module):
    """RMSNorm inside attention: of queries, keys or a latent, over the last axes, which are called `axes`."""

    axes: tuple[str, ...]
    epsilon: float
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        count = len(self.axes)
        scale = declare(self, "scale", x.shape[-count:], self.axes, nn.initializers.ones, self.param_dtype)
        x32 = x.astype(jnp.float32)
        energy = jnp.mean(jnp.square(x32), axis=tuple(range(-count, 0)), keepdims=True)
        broadcast = (None,) * (x.ndim - count)
        return (x32 * jax.lax.rsqrt(energy + self.epsilon) * scale.astype(jnp.float32)[broadcast]).astype(x.dtype)


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (Shazeer 2020); `axis` is the logical name of its `width` neurons."""

    config: ModelConfig
    runtime: Runtime
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
        biases: list[jax.Array | None] = [None, None, None]
        if c.mlp_bias:
            wanted = (("gate_bias", self.width, self.axis), ("up_bias", self.width, self.axis))
            biases = [declare_bias(self, *one, c) for one in (*wanted, ("down_bias", c.model_dim, "embed"))]
        gate_BTF, up_BTF = (
            plus(named(project(x_BTD, weight_DF, runtime=self.runtime, channels=0), PROJECTIONS), bias)
            for weight_DF, bias in ((gate_DF, biases[0]), (up_DF, biases[1]))
        )
        a_BTF = nn.silu(gate_BTF) * up_BTF
        record(self, "neurons", a_BTF, mask_BT)
        return plus(project(a_BTF, down_FD, runtime=self.runtime, channels=-1), biases[2])
