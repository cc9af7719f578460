"""What the Pallas kernels of a compiled step execute, read off their shapes."""

import math
from collections.abc import Sequence

from kernels.grouped_matmul import gpu, gpu_outer, gpu_product, megablox, tpu, tpu_mlp, tpu_outer, tpu_product
from kwaicoder_jax import models
from kwaicoder_jax.hardware import hlo, work
from kwaicoder_jax.models import gpu_attention, splash_attention


def kernel_work(runtime: models.Runtime) -> work.KernelWork:
    """FLOPs and bytes of HBM, tiles that are computed in part or twice included; None for a kernel unknown here."""

    def of(kernel: work.Kernel) -> tuple[float, float] | None:
        if kernel.name.startswith("splash_"):
            return _attention(kernel)
        if kernel.name.startswith("mha_"):
            return _gpu_attention(kernel)
        if kernel.name in tpu_mlp.KERNELS:
            return _fused(kernel)
        if kernel.name not in _PRODUCTS and kernel.name not in _OUTERS:
            return kernel.estimate
        # Rows of a buffer that even routing does not fill are not worked on.
        filled = 1 / runtime.expert_buffer if f"/{BY_TOKENS}/" in kernel.source else 1.0
        return _product(kernel, filled) if kernel.name in _PRODUCTS else _outer(kernel, filled)

    return of


# By name, the module that knows the tiles.
_PRODUCTS = {tpu_product.NAME: tpu, "gmm": megablox, gpu_product.NAME: gpu}
_OUTERS = {tpu_outer.NAME: tpu, "tgmm": megablox, gpu_outer.NAME: gpu}
BY_TOKENS = "moe._by_tokens"  # scope of `MoE._by_tokens`


def _attention(kernel: work.Kernel) -> tuple[float, float]:
    query, key, *_ = (array for array in kernel.operands if _is_float(array) and len(array.shape) >= 3)
    batch, (heads, time, width) = math.prod(query.shape[:-3]), query.shape[-3:]
    backward = "_dkv" in kernel.name
    size = _itemsize(query)
    return splash_attention.work(batch, heads, time, width, size, backward=backward, keys=key.shape[-2])


def _gpu_attention(kernel: work.Kernel) -> tuple[float, float]:
    query = kernel.operands[0]
    batch, time, heads, width = query.shape
    if kernel.name == "mha_preprocess_backward":  # sums of products of two arrays
        return 0.0, 2 * query.nbytes
    return gpu_attention.work(batch, heads, time, width, _itemsize(query), backward=kernel.name == "mha_backward")


def _fused(kernel: work.Kernel) -> tuple[float, float] | None:
    if kernel.estimate is None:
        return None
    (sizes, *_), (matrix, *_) = kernel.operands, _of_rank(kernel.operands[1:], 3)[-1:]
    return tpu_mlp.work(*kernel.estimate, kernel.results[0].shape[0], sizes.shape[0], _itemsize(matrix))


def _product(kernel: work.Kernel, filled: float) -> tuple[float, float]:
    (left,), (right,), (out,) = _of_rank(kernel.operands, 2), _of_rank(kernel.operands, 3), kernel.results
    rows, depth = round(filled * left.shape[0]), left.shape[1]
    made = _PRODUCTS[kernel.name].product_work
    return made(rows, right.shape[0], depth, out.shape[1], _itemsize(left))


def _outer(kernel: work.Kernel, filled: float) -> tuple[float, float]:
    groups, depth, width = kernel.results[0].shape
    rows = math.prod(_of_rank(kernel.operands, 2)[0].shape) // depth  # its transpose may have been turned around
    return _OUTERS[kernel.name].outer_work(round(filled * rows), groups, depth, width, _itemsize(kernel.results[0]))


def _of_rank(arrays: Sequence[hlo.Array], rank: int) -> list[hlo.Array]:
    return [array for array in arrays if len(array.shape) == rank and _is_float(array)]


def _is_float(array: hlo.Array) -> bool:
    return array.dtype in ("bf16", "f32", "f16")


def _itemsize(array: hlo.Array) -> int:
    return round(array.nbytes / math.prod(array.shape))
