"""Wall time of the grouped products on the machine that runs this."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kernels.grouped_matmul import PLATFORMS, Backend

_ROUNDS = 11


def backends(platform: str) -> list[Backend]:
    """Those that are worth timing on a platform, as jax names it."""
    ours = [backend for backend in Backend if PLATFORMS.get(backend) == platform]
    upstream = {"tpu": [Backend.MEGABLOX], "cpu": [Backend.CPU, Backend.REFERENCE]}.get(platform, [])
    return [*ours, *upstream, Backend.RAGGED_DOT]


def seconds(function: Callable[..., jax.Array], arguments: Sequence[jax.ShapeDtypeStruct], sizes: np.ndarray) -> float:
    """The median of several runs after one to compile and warm up, each waited for.

    Args:
      function: of two arrays and the group sizes.
      arguments: their shapes; operands are random.
      sizes: of the groups.
    """
    *arrays, _ = arguments
    keys = jax.random.split(jax.random.key(0), len(arrays))
    operands = [jax.random.normal(key, each.shape, each.dtype) for key, each in zip(keys, arrays, strict=True)]
    compiled, sizes_G = jax.jit(function), jnp.asarray(sizes)
    jax.block_until_ready(compiled(*operands, sizes_G))
    found = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(*operands, sizes_G))
        found.append(time.perf_counter() - began)
    return statistics.median(found)
