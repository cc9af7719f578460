"""What the Pallas kernels of a compiled step execute, read off their shapes."""

import math
from collections.abc import Sequence

from kernels.grouped_matmul import megablox
from kwaicoder_jax.hardware import hlo, work
from kwaicoder_jax.models import splash_attention


def kernel_work(kernel: work.Kernel) -> tuple[float, float] | None:
    """FLOPs and bytes of HBM, tiles that are computed in part or twice included; None for a kernel unknown here."""
    if kernel.name.startswith("splash_"):
        query = next(array for array in kernel.operands if _is_float(array) and len(array.shape) >= 3)
        batch, (heads, time, width) = math.prod(query.shape[:-3]), query.shape[-3:]
        backward = "_dkv" in kernel.name
        return splash_attention.work(batch, heads, time, width, _itemsize(query), backward=backward)
    if kernel.name == "gmm":
        (left,), (right,), (out,) = _of_rank(kernel.operands, 2), _of_rank(kernel.operands, 3), kernel.results
        return megablox.product_work(left.shape[0], right.shape[0], left.shape[1], out.shape[1], _itemsize(left))
    if kernel.name == "tgmm":
        groups, depth, width = kernel.results[0].shape
        count = math.prod(_of_rank(kernel.operands, 2)[0].shape) // depth  # its transpose may have been turned around
        return megablox.outer_work(count, groups, depth, width, _itemsize(kernel.results[0]))
    return kernel.estimate


def _of_rank(arrays: Sequence[hlo.Array], rank: int) -> list[hlo.Array]:
    return [array for array in arrays if len(array.shape) == rank and _is_float(array)]


def _is_float(array: hlo.Array) -> bool:
    return array.dtype in ("bf16", "f32", "f16")


def _itemsize(array: hlo.Array) -> int:
    return round(array.nbytes / math.prod(array.shape))
