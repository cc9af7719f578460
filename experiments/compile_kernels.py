"""What the Pallas kernels of a compiled step execute, read off their shapes."""

from collections.abc import Sequence

import numpy as np

from kernels.grouped_matmul import megablox
from kwaicoder_jax.hardware import hlo, work
from kwaicoder_jax.models import splash_attention


def kernel_work(kernel: work.Kernel) -> tuple[float, float] | None:
    """FLOPs and bytes of HBM, tiles that are computed in part or twice included; None for a kernel unknown here."""
    if kernel.name.startswith("splash_"):
        (query, *_), backward = _of_rank(kernel.operands, 4), "_dkv" in kernel.name
        batch, heads, time, width = query.shape
        return splash_attention.work(batch, heads, time, width, _itemsize(query), backward=backward)
    if kernel.name == "gmm":
        (rows,), (matrices,), (out,) = _of_rank(kernel.operands, 2), _of_rank(kernel.operands, 3), kernel.results
        (count, depth), groups = rows.shape, matrices.shape[0]
        return megablox.product_work(count, groups, depth, out.shape[1], _itemsize(rows))
    if kernel.name == "tgmm":
        (depth, count), (groups, _, width) = _of_rank(kernel.operands, 2)[0].shape, kernel.results[0].shape
        return megablox.outer_work(count, groups, depth, width, _itemsize(kernel.results[0]))
    return kernel.estimate


def _of_rank(arrays: Sequence[hlo.Array], rank: int) -> list[hlo.Array]:
    return [array for array in arrays if len(array.shape) == rank and array.dtype not in ("s32", "s8", "u8")]


def _itemsize(array: hlo.Array) -> int:
    return round(array.nbytes / np.prod(array.shape))
