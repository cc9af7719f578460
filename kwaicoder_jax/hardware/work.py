"""What a compiled module executes: FLOPs of products and kernels, and bytes to and from HBM, loops multiplied out.

XLA's own `cost_analysis` counts the body of a loop once, and a kernel's estimate is the work that its caller wanted, not
the tiles that it runs; here loops count as often as they run, and the caller may say what a kernel executes.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

from kwaicoder_jax.hardware.hlo import BYTES, Array, Computation, Instruction, Module, arrays

MATMUL = "matmul"
KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton")
_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "iota", "copy-start", "async-start", "call-start", "async-done",
    "call-done", "rng-get-and-update-state",
)  # fmt: skip

_OPERANDS_IN_TYPE = ("all-gather-start", "reduce-scatter-start", "all-to-all-start", "collective-permute-start")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One call of a hand-written kernel, for those who know what it does.

    Attributes:
      name: of the kernel, without the compiler's number.
      operands: what it reads.
      results: what it writes.
      estimate: its author's FLOPs and bytes, if there is an estimate.
      source: where it is called in the traced function.
    """

    name: str
    operands: Sequence[Array]
    results: Sequence[Array]
    estimate: tuple[float, float] | None
    source: str = ""


# FLOPs and bytes of HBM that a kernel executes, or None for one that is not known.
KernelWork = Callable[[Kernel], tuple[float, float] | None]


def estimated(kernel: Kernel) -> tuple[float, float] | None:
    """As its author estimates."""
    return kernel.estimate


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one device, in one run of the module.

    Attributes:
      flops: multiplications and additions of products.
      by_kind: the same by kernel, and of products as "matmul"; if both operands have 8 bits, as "matmul s8" and the like.
      hbm_bytes: read and written, every instruction's operands and results once.
      unknown_kernels: calls by name whose work nobody tells; they count nothing.
      unknown_loops: loops that count as one iteration.
    """

    flops: float
    by_kind: Mapping[str, float]
    hbm_bytes: float
    unknown_kernels: Mapping[str, int]
    unknown_loops: Sequence[str]


def measure(module: Module, kernel_work: KernelWork = estimated, *, rare: Sequence[str] = ()) -> Work:
    """Adds up the whole module.

    Args:
      module: the program.
      kernel_work: what hand-written kernels execute.
      rare: scopes of the traced function that are not counted: work for cases that hardly come up.

    Returns:
      The work; of loops whose trip count is unknown, those outside of `rare` are named in it.
    """
    flops: dict[str, float] = collections.defaultdict(float)
    unknown: collections.Counter[str] = collections.Counter()
    moved = 0.0
    for computation, instruction, times in module.walk():
        if any(f"/{scope}/" in instruction.source for scope in rare):
            continue
        moved += times * _hbm_bytes(module, computation, instruction, kernel_work)
        for kind, value in _flops(module, computation, instruction, kernel_work).items():
            if value is None:
                unknown[kind] += times
            else:
                flops[kind] += times * value
    return Work(sum(flops.values()), dict(flops), moved, dict(unknown), module.unknown_loops(rare))


def computes(module: Module, instruction: Instruction, *, products_only: bool = False) -> bool:
    """Whether the instruction is arithmetic of some size, something that a transfer can hide behind.

    Args:
      module: the program.
      instruction: of it.
      products_only: fusions without a product do not count. TPU programs are fusions throughout; on GPU those are small.
    """
    if instruction.op == "fusion" and products_only:
        inner = module.computations[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
        return any(computes(module, each, products_only=True) for each in inner.values())
    if instruction.op in ("while", "convolution", "dot", "fusion"):
        return True
    return instruction.op == "custom-call" and (_is_kernel(instruction) or _is_gemm(instruction))


def _flops(
    module: Module, computation: Computation, instruction: Instruction, kernel_work: KernelWork
) -> dict[str, float | None]:
    if instruction.op in ("dot", "convolution"):
        count = _dot_flops if instruction.op == "dot" else _convolution_flops
        types = computation.operand_types(instruction)
        return {_matmul(types): count(instruction, types)}
    if instruction.op == "custom-call" and _is_kernel(instruction):
        kernel = _kernel(computation, instruction)
        known = kernel_work(kernel)
        return {kernel.name: None if known is None else known[0]}
    if instruction.op == "custom-call" and _is_gemm(instruction):
        types = computation.operand_types(instruction)
        return {_matmul(types): _gemm_flops(instruction, types)}
    total: dict[str, float | None] = {}
    if instruction.op == "fusion":
        inner = module.computations[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
        for each in inner.values():
            for kind, value in _flops(module, inner, each, kernel_work).items():
                total[kind] = None if value is None else (total.get(kind) or 0.0) + value
    return total


def _matmul(operands: Sequence[str]) -> str:
    left, right = (arrays(type_)[0] for type_ in operands[:2])
    return MATMUL if max(BYTES[left.dtype], BYTES[right.dtype]) > 1 else f"{MATMUL} {left.dtype}"


def operand_type(kind: str) -> str:
    """The operands' type of a kind of `Work.by_kind`: bf16, unless it names one of 8 bits."""
    return kind.removeprefix(MATMUL).strip() if kind.startswith(f"{MATMUL} ") else "bf16"


def _is_gemm(instruction: Instruction) -> bool:
    return "gemm" in (instruction.attribute(r'custom_call_target="([^"]*)"') or "")


def _is_kernel(instruction: Instruction) -> bool:
    return any(name in (instruction.attribute(r'custom_call_target="([^"]*)"') or "") for name in KERNELS)


def _kernel(computation: Computation, instruction: Instruction) -> Kernel:
    flops = instruction.attribute(r'cost_estimate"?:\{"flops":"?(\d+)')
    moved = instruction.attribute(r'bytes_accessed"?:"?(\d+)')
    read = [array for type_ in computation.operand_types(instruction) for array in arrays(type_)]
    name = _kernel_name(instruction) or re.sub(r"[.\d]+$", "", instruction.name)
    estimate = None if flops is None else (float(flops), float(moved or 0))
    return Kernel(name, read, arrays(instruction.type), estimate, instruction.source)


def _kernel_name(instruction: Instruction) -> str | None:
    """Of a GPU's kernel: Triton's stands in its configuration, Mosaic GPU's in the source alone."""
    if "tpu_custom_call" in instruction.attributes:
        return None
    return instruction.attribute(r'\bname = "(\w+)"') or instruction.attribute(r"(\w+)\)*/mpmd_map\b")


def _dot_flops(instruction: Instruction, operands: Sequence[str]) -> float:
    left = arrays(operands[0])[0].shape
    contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    depth = math.prod(left[int(axis)] for axis in contracted.split(",") if axis)
    return 2.0 * math.prod(arrays(instruction.type)[0].shape) * depth


def _gemm_flops(instruction: Instruction, operands: Sequence[str]) -> float:
    contracted = instruction.attribute(r'lhs_contracting_dimensions":\["?(\d+)')
    depth = arrays(operands[0])[0].shape[int(contracted or -1)]
    return 2.0 * math.prod(arrays(instruction.type)[0].shape) * depth


def _convolution_flops(instruction: Instruction, operands: Sequence[str]) -> float:
    """Only window positions inside the input count; XLA writes products of matrices this way."""
    left, right = (arrays(type_)[0].shape for type_ in operands[:2])
    out = arrays(instruction.type)[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None
    left_axes, right_axes, out_axes = labels.groups()
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    window = dict(re.findall(r"(\w+)=(\S+)", text))
    spatial = len(left_axes) - 2

    def option(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * spatial

    sizes, strides, pads, dilations, steps = (
        option(name, default)
        for name, default in (("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))
    )
    positions = 1
    for axis in range(spatial):
        positions *= _valid_positions(
            left[left_axes.index(str(axis))], out[out_axes.index(str(axis))], int(sizes[axis]), int(strides[axis]),
            int(pads[axis].split("_")[0]), int(dilations[axis]), int(steps[axis]),
        )  # fmt: skip
    depth = right[right_axes.index("i")]
    return 2.0 * out[out_axes.index("b")] * out[out_axes.index("f")] * depth * positions


def _valid_positions(size: int, out: int, window: int, stride: int, pad: int, dilation: int, step: int) -> int:
    if window == 1 and pad == 0 and dilation == 1:
        return out
    span, count = (size - 1) * dilation, 0
    for k in range(window):
        shift = k * step - pad
        if dilation == 1:
            first, last = max(0, -(shift // stride)) if shift < 0 else 0, min(out - 1, (span - shift) // stride)
            count += max(0, last - first + 1)
        else:
            places = (o * stride + shift for o in range(out))
            count += sum(1 for place in places if 0 <= place <= span and place % dilation == 0)
    return count


def _hbm_bytes(module: Module, computation: Computation, instruction: Instruction, kernel_work: KernelWork) -> float:
    """Operands and results that lie in HBM; of a slice of an array, the slice."""
    if instruction.op in _FREE or instruction.op.endswith("-done"):
        return 0.0
    if instruction.op == "fusion":
        return _fusion_bytes(module, computation, instruction)
    if instruction.op == "custom-call" and _is_kernel(instruction):
        known = kernel_work(_kernel(computation, instruction))
        if known is not None:
            return known[1]
    if instruction.op in _OPERANDS_IN_TYPE:
        return _in_hbm(instruction.type)
    types = computation.operand_types(instruction)
    if instruction.op in ("dynamic-slice", "gather", "slice"):
        return 2 * _in_hbm(instruction.type)
    if instruction.op == "dynamic-update-slice":
        return 2 * _in_hbm(types[1])
    return sum(map(_in_hbm, types)) + _in_hbm(instruction.type)


def _in_hbm(type_: str) -> float:
    return sum(array.nbytes for array in arrays(type_) if array.in_hbm)


def _fusion_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    inner = module.computations[instruction.attribute(r"calls=%?([\w.\-]+)") or ""]
    total = 0.0
    updated: set[str] = set()
    for each in inner.values():
        if each.op == "dynamic-update-slice":
            total += 2 * _in_hbm(inner[each.operands[1]].type) if each.operands[1] in inner else 0.0
            updated.add(each.operands[0])
    for each in inner.values():
        if each.op != "parameter" or each.name in updated:
            continue
        outer = instruction.operands[int(each.argument)]
        if outer not in computation or not _in_hbm(computation[outer].type):
            continue
        users = [user for user in inner.values() if each.name in user.operands]
        sliced = users and all(user.op in ("dynamic-slice", "slice", "gather") for user in users)
        total += sum(_in_hbm(user.type) for user in users) if sliced else _in_hbm(computation[outer].type)
    return total + (0.0 if updated else _in_hbm(instruction.type))
