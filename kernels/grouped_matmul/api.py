"""Grouped matmul: out[rows of group g] = lhs[rows of group g] @ rhs[g], for group sizes known only at run time.

Dimension letters: M rows, G groups, K contracted width, N output width.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import cpu, gpu, megablox, ragged_dot, reference, tokamax, tpu
from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices, scale_rows


class Backend(enum.StrEnum):
    """Which implementation computes the three products (forward, dlhs, drhs)."""

    AUTO = "auto"  # the best one for the platform that the computation is compiled for
    TPU = "tpu"  # our Pallas kernels for TPU; bfloat16 and float32
    GPU = "gpu"  # our Pallas kernels for Hopper; bfloat16 and float16, widths that are multiples of 64
    CPU = "cpu"  # loops over row tiles; compiles everywhere, fast on CPU
    REFERENCE = "reference"  # one-hot masks, float32: G times the work
    RAGGED_DOT = "ragged_dot"  # jax.lax.ragged_dot; on CPU and in drhs also G times the work
    MEGABLOX = "megablox"  # jax's Pallas kernels for TPU; interpreted on CPU
    TOKAMAX = "tokamax"  # tokamax's Pallas kernels for TPU, to compare with; tokamax has to be installed


#: Back ends that run on one platform alone, as jax names it, and compile on no other.
PLATFORMS = {Backend.TPU: "tpu", Backend.TOKAMAX: "tpu", Backend.GPU: "gpu"}


def grouped_matmul(
    lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array, *, backend: Backend | str = Backend.AUTO
) -> jax.Array:
    """Multiplies each group's consecutive rows by that group's matrix; differentiable in `lhs_MK` and `rhs_GKN`.

    Of matrices that are `quantize`d only the first gradient is computed; they count as constants.

    Rows at or beyond sum(group_sizes) belong to no group: their outputs and the gradients of their inputs are zero, and
    what they hold (NaN too) reaches nothing. A group without rows gets a zero gradient.

    Args:
      lhs_MK: rows, sorted by group.
      rhs_GKN: one matrix per group, of the same dtype; or from `quantize`.
      group_sizes_G: int32, non-negative, summing to at most M.
      backend: a Backend or its value.

    Returns:
      [M, N] in the dtype of `lhs_MK`, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown backend.
    """
    if lhs_MK.ndim != 2 or rhs_GKN.ndim != 3 or group_sizes_G.ndim != 1:
        shapes = f"{lhs_MK.shape}, {rhs_GKN.shape}, {group_sizes_G.shape}"
        raise ValueError(f"need lhs [M, K], rhs [G, K, N], sizes [G]; got {shapes}")
    if lhs_MK.shape[1] != rhs_GKN.shape[1] or rhs_GKN.shape[0] != group_sizes_G.shape[0]:
        raise ValueError(f"lhs {lhs_MK.shape}, rhs {rhs_GKN.shape} and sizes {group_sizes_G.shape} do not fit together")
    kind = lhs_MK.dtype if isinstance(rhs_GKN, ScaledMatrices) else rhs_GKN.dtype
    if lhs_MK.dtype != kind or not jnp.issubdtype(group_sizes_G.dtype, jnp.integer):
        raise ValueError(f"dtypes {lhs_MK.dtype}, {kind}, {group_sizes_G.dtype}: need two equal and integers")
    return _grouped_matmul(Backend(backend), lhs_MK, rhs_GKN, group_sizes_G.astype(jnp.int32))


def product(
    backend: Backend,
    lhs_MK: jax.Array,
    rhs_GKN: Matrices,
    group_sizes_G: jax.Array,
    *,
    transpose_rhs: bool = False,
) -> jax.Array:
    """The forward product; dlhs with `transpose_rhs`, for which `rhs` is [G, N, K]; not differentiable.

    Of matrices with scales those belong to axis 2 of `rhs` in both.
    """
    if isinstance(rhs_GKN, ScaledMatrices):
        if not transpose_rhs:
            return _scaled_product(backend, lhs_MK, rhs_GKN, group_sizes_G)
        lhs_MK = scale_rows(lhs_MK, rhs_GKN.scale_G1N, group_sizes_G)
        rhs_GKN = rhs_GKN.values_GKN

    def widened(module: ModuleType, rhs: jax.Array) -> jax.Array:
        return rhs if module is tpu else rhs.astype(lhs_MK.dtype)

    def by(module: ModuleType) -> Callable[..., jax.Array]:
        if transpose_rhs and module in (tpu, megablox, tokamax, gpu):  # read them as they lie
            return lambda lhs_MK, rhs_GNK, sizes_G: module.product(
                lhs_MK, widened(module, rhs_GNK), sizes_G, transpose_rhs=True
            )
        if transpose_rhs:
            return lambda lhs_MK, rhs_GNK, sizes_G: module.product(
                lhs_MK, widened(module, rhs_GNK.swapaxes(1, 2)), sizes_G
            )
        return module.product

    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    return _dispatch(backend, by, _on_gpu(lhs_MK, width), lhs_MK, rhs_GKN, group_sizes_G)


def _scaled_product(
    backend: Backend, lhs_MK: jax.Array, rhs_GKN: ScaledMatrices, group_sizes_G: jax.Array
) -> jax.Array:
    """The forward product: on TPU and CPU matrices are made wider as they are read, elsewhere before."""

    def by(module: ModuleType) -> Callable[..., jax.Array]:
        def call(lhs_MK: jax.Array, values_GKN: jax.Array, scale_G1N: jax.Array, sizes_G: jax.Array) -> jax.Array:
            if module in (tpu, cpu):
                return module.product(lhs_MK, ScaledMatrices(values_GKN, scale_G1N), sizes_G)  # type: ignore[no-any-return]
            out_MN = module.product(lhs_MK, values_GKN.astype(lhs_MK.dtype), sizes_G)
            return scale_rows(out_MN, scale_G1N, sizes_G)

        return call

    on_gpu = _on_gpu(lhs_MK, rhs_GKN.shape[2])
    return _dispatch(backend, by, on_gpu, lhs_MK, rhs_GKN.values_GKN, rhs_GKN.scale_G1N, group_sizes_G)


def outer(backend: Backend, lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """The product drhs[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N]; not differentiable."""
    on_gpu = _on_gpu(lhs_MK, dout_MN.shape[1])
    return _dispatch(backend, lambda module: module.outer, on_gpu, lhs_MK, dout_MN, group_sizes_G)


def _on_gpu(lhs_MK: jax.Array, width: int) -> ModuleType:
    return gpu if gpu.fits(lhs_MK.dtype, lhs_MK.shape[1], width) else ragged_dot


_BACKENDS = {
    Backend.TPU: tpu,
    Backend.CPU: cpu,
    Backend.REFERENCE: reference,
    Backend.RAGGED_DOT: ragged_dot,
    Backend.MEGABLOX: megablox,
    Backend.GPU: gpu,
    Backend.TOKAMAX: tokamax,
}


def _dispatch(
    backend: Backend, function_of: Callable[[ModuleType], Callable[..., jax.Array]], on_gpu: ModuleType,
    *operands: jax.Array,
) -> jax.Array:  # fmt: skip
    if backend is not Backend.AUTO:
        return function_of(_BACKENDS[backend])(*operands)
    return jax.lax.platform_dependent(
        *operands, cpu=function_of(cpu), tpu=function_of(tpu if tpu.fits(operands[0].dtype) else megablox),
        cuda=function_of(on_gpu), default=function_of(ragged_dot),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(backend: Backend, lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array) -> jax.Array:
    return product(backend, lhs_MK, rhs_GKN, group_sizes_G)


_Residuals = tuple[jax.Array, Matrices, jax.Array]


def _forward(
    backend: Backend, lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array
) -> tuple[jax.Array, _Residuals]:
    return product(backend, lhs_MK, rhs_GKN, group_sizes_G), (lhs_MK, rhs_GKN, group_sizes_G)


def _backward(backend: Backend, residuals: _Residuals, dout_MN: jax.Array) -> tuple[jax.Array, jax.Array | None, None]:
    lhs_MK, rhs_GKN, group_sizes_G = residuals
    dlhs_MK = product(backend, dout_MN, rhs_GKN, group_sizes_G, transpose_rhs=True)
    if isinstance(rhs_GKN, ScaledMatrices):
        return dlhs_MK, None, None
    return dlhs_MK, outer(backend, lhs_MK, dout_MN, group_sizes_G), None


_grouped_matmul.defvjp(_forward, _backward)
