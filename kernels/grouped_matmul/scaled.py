"""Matrices of 8 bits with a scale for each column: half the bytes of bfloat16 in memory, on the wire and into VMEM.

    rhs[g, k, n] ~ values[g, k, n] * scale[g, 0, n]

Rows stay as they are: values become numbers of the rows' dtype where they are multiplied (exactly: bfloat16 holds all of both
formats), and a column of the result is scaled in float32. int8 is symmetric, from -127 to 127 (absmax; Dettmers et al. 2022,
arXiv 2208.07339, section 3.1, of the weights alone); fp8 is e4m3, to 448 (Micikevicius et al. 2022, arXiv 2209.05433).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# The largest number of each format.
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledMatrices:
    """One matrix per group; constants for gradients.

    Attributes:
      values_GKN: int8 or float8_e4m3fn.
      scale_G1N: float32.
    """

    values_GKN: jax.Array
    scale_G1N: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """[G, K, N]."""
        return self.values_GKN.shape

    @property
    def ndim(self) -> int:
        """3."""
        return self.values_GKN.ndim

    def dense(self, dtype: Any) -> jax.Array:
        """The matrices that these stand for, [G, K, N]."""
        return (self.values_GKN.astype(jnp.float32) * self.scale_G1N).astype(dtype)


Matrices = jax.Array | ScaledMatrices


def quantize(rhs_GKN: jax.Array, dtype: Any = jnp.int8) -> ScaledMatrices:
    """Matrices in 8 bits, each column with the scale that takes its largest number to the format's.

    int8 is off by half a scale at most; e4m3 by 1/16 of each number, and by scale / 1024 where that is more.

    Args:
      rhs_GKN: one matrix per group, of any float dtype.
      dtype: int8 or float8_e4m3fn.

    Raises:
      ValueError: another dtype.
    """
    if jnp.dtype(dtype) not in LARGEST:
        raise ValueError(f"matrices are scaled to {', '.join(map(str, LARGEST))}, not {jnp.dtype(dtype)}")
    return ScaledMatrices(*scaled(rhs_GKN, axis=1, dtype=dtype))


def scaled(x: jax.Array, axis: int, dtype: Any = jnp.int8) -> tuple[jax.Array, jax.Array]:
    """Values of `dtype` and float32 scales such that x ~ values * scale; one scale along `axis`, which stays with size 1."""
    most, x32 = LARGEST[jnp.dtype(dtype)], x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis, keepdims=True), 1e-30) / most
    values = x32 / scale
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(values).astype(dtype), scale
    return jnp.clip(values, -most, most).astype(dtype), scale  # what is rounded above the largest would become NaN


def scale_rows(rows_MN: jax.Array, scale_G1N: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """Each row times its group's scales, in float32 and back; rows of no group stay as they are."""
    ends_G, row_M = jnp.cumsum(group_sizes_G), jnp.arange(rows_MN.shape[0], dtype=jnp.int32)
    group_M = jnp.searchsorted(ends_G, row_M, side="right")
    scale_MN = scale_G1N[:, 0].at[group_M].get(mode="fill", fill_value=1.0)
    return (rows_MN.astype(jnp.float32) * scale_MN).astype(rows_MN.dtype)
