"""Parameters as decode steps read them: every layer's arrays of their own, in the dtype and the form of the computation.

A decode step is bound by reading weights. A slice of a stack of layers is an array that has to be made before it is read
(on CPU), and so is a weight in another dtype: both are done once, here. Matrices that multiply the same input are put side
by side, since one wide product is read faster, and by more threads, than three narrow ones.
"""

import enum
import functools
import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels.grouped_matmul import ScaledMatrices, quantize
from kwaicoder_jax import models
from kwaicoder_jax.inference import matrices
from kwaicoder_jax.inference.matrices import Columns, FloatMatrix, Matrix
from kwaicoder_jax.models import ModelConfig, Params

STACKS = ("dense_layers", "layers")
# Weights that the model reads through `models.layers.project`: those of one group multiply one input.
GROUPS = (("query", "key", "value"), ("out",), ("gate", "up"), ("down",), ("query_down", "kv_down"), ("query_up",))
INNER = {"out": 2}  # how many of their axes a product contracts, where it is not one


class Form(enum.StrEnum):
    """How matrices are stored."""

    FLOAT = "float"  # in the dtype of the computation
    INT8 = "int8"  # see `matrices.Int8Matrix`; routed experts by `kernels.grouped_matmul.quantize`, on one device


@flax.struct.dataclass
class Stack:
    """The layers of one stack.

    Attributes:
      arrays: of each layer, by path: what is stored as declared, and quantized experts.
      matrices: of each layer, by name.
      parts: (path of a declared weight, name of its matrix, first column, axes behind the contracted ones).
    """

    arrays: tuple[dict[str, jax.Array | ScaledMatrices], ...]
    matrices: tuple[dict[str, Matrix], ...]
    parts: tuple[tuple[str, str, int, tuple[int, ...]], ...] = flax.struct.field(pytree_node=False)

    def params(self) -> Params:
        """The stack as `models.forward` reads it, with a leading layer axis; see `Weights.params`."""
        arrays, joined = (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) for layers in (self.arrays, self.matrices)
        )
        columns = {path: Columns(joined[name], start, outer) for path, name, start, outer in self.parts}
        return models.unflatten(arrays | columns)


@flax.struct.dataclass
class Weights:
    """What `prepare` makes.

    Attributes:
      stacks: of layers, by name.
      rest: the parameters of no layer, without the head.
      head: the vocabulary projection: [V, D], or a matrix [D, V].
      tied: whether the model reads the embedding as its head.
    """

    stacks: dict[str, Stack]
    rest: Params
    head: jax.Array | Matrix
    tied: bool = flax.struct.field(pytree_node=False)

    @property
    def platform(self) -> str:
        """Where the arrays are: "cpu", "tpu", ..."""
        return next(iter(jax.tree.leaves(self.rest)[0].devices())).platform

    def params(self) -> Params:
        """The tree that `models.forward` reads; for a traced function that unrolls the layers (`scan_unroll=0`).

        XLA takes the slice of a stack for the operand that it is, so that nothing is copied.
        """
        head: Any = self.head if isinstance(self.head, jax.Array) else Columns(self.head, 0, ())
        return (
            self.rest
            | ({} if self.tied else {"head": head})
            | {name: stack.params() for name, stack in self.stacks.items()}
        )

    def logits(self, hidden_MD: jax.Array) -> jax.Array:
        """Float32 logits, [M, V]."""
        if isinstance(self.head, jax.Array):
            return models.logits(hidden_MD[None], self.head)[0]
        return self.head.multiply(hidden_MD)


def prepare(params: Params, config: ModelConfig, form: Form | str = Form.FLOAT) -> Weights:
    """Copies parameters into the form of an engine; drop `params` afterwards to have their memory back.

    Args:
      params: as `config` declares them; on a mesh weights keep their sharding. Of ShapeDtypeStructs with shardings shapes
        are made, with the shardings that the arrays would have: compiled for their devices, which need not be here.
      config: the model; weights get its `dtype`.
      form: how matrices are stored.
    """
    form, alone = Form(form), _on_one_device(params)
    stacks = {name: _stack(models.flatten(params[name]), config, form, alone) for name in STACKS if name in params}
    rest = {name: value for name, value in params.items() if name not in (*STACKS, "head")}
    rest["embedding"] = _made(_cast, rest["embedding"], dtype=config.dtype)
    tied = "head" not in params
    head_VD = rest["embedding"] if tied else _made(_cast, params["head"], dtype=config.dtype)
    # On one device columns lie side by side, as in a layer: a CPU reads them a quarter faster than the embedding's rows.
    plain = form is Form.FLOAT and not alone
    return Weights(stacks, rest, head_VD if plain else _made(_transposed, head_VD, form=form), tied)


def _on_one_device(params: Params) -> bool:
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return len(leaf.sharding.device_set) == 1
    return not isinstance(leaf, jax.Array) or len(leaf.devices()) == 1


def _made(function: Any, *operands: Any, **options: Any) -> Any:
    """`function(*operands)`, jitted; of ShapeDtypeStructs the shapes, where the compiler would lay them."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(operands)):
        return _shapes_made(function, operands, tuple(options.items()))
    return function(*operands, **options)


@functools.lru_cache(maxsize=1024)  # all layers are alike
def _shapes_made(function: Any, operands: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    lowered = function.lower(*operands, **dict(options))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        lowered.out_info, lowered.compile().output_shardings,
    )  # fmt: skip


def _stack(flat: Mapping[str, Any], config: ModelConfig, form: Form, alone: bool) -> Stack:
    """One stack, from its parameters by path, each with a leading layer axis."""
    groups = _groups(flat, together=alone) if alone or form is Form.INT8 else {}
    grouped = {path for paths in groups.values() for path in paths}
    experts = _experts(flat, config) if alone and form is Form.INT8 else set()
    parts, arrays, joined = [], [], []
    for name, paths in groups.items():
        start = 0
        for path in paths:
            outer = tuple(flat[path].shape[1 + _inner(path) :])
            parts.append((path, name, start, outer))
            start += math.prod(outer)
    for layer in range(next(iter(flat.values())).shape[0]):
        one = {path: _made(_layer, leaf, layer, dtype=_dtype(path, leaf, config)) for path, leaf in flat.items()}
        arrays.append(
            {
                path: _made(_quantized, leaf) if path in experts else leaf
                for path, leaf in one.items()
                if path not in grouped
            }
        )
        flats = {path: _made(_flat, one[path], inner=_inner(path)) for path in grouped}
        joined.append(
            {name: _made(_matrix, tuple(flats[path] for path in paths), form=form) for name, paths in groups.items()}
        )
    return Stack(tuple(arrays), tuple(joined), tuple(parts))


def _groups(flat: Mapping[str, Any], *, together: bool) -> dict[str, list[str]]:
    """The matrices to be made: name to paths of the weights that they hold."""
    found: dict[str, list[str]] = {}
    for path in flat:
        module, _, last = path.rpartition("/")
        if module == "moe":  # routed experts
            continue
        for group in GROUPS:
            if last in group:
                found.setdefault(f"{module}/{group[0]}" if together else path, []).append(path)
    return found


def _experts(flat: Mapping[str, Any], config: ModelConfig) -> set[str]:
    """Paths of the routed experts' matrices, unless these are made longer by biases."""
    if config.experts is None or config.experts.bias:
        return set()
    return {path for path in flat if path in ("moe/gate", "moe/up", "moe/down")}


def _inner(path: str) -> int:
    return INNER.get(path.rpartition("/")[2], 1)


def _dtype(path: str, leaf: Any, config: ModelConfig) -> str:
    return str(leaf.dtype) if path.endswith(models.AS_STORED) else config.dtype


@functools.partial(jax.jit, static_argnames="dtype")
def _layer(stacked: jax.Array, layer: Any, dtype: str) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False).astype(dtype)


@jax.jit
def _quantized(matrices_EDF: jax.Array) -> ScaledMatrices:
    return quantize(matrices_EDF)


@functools.partial(jax.jit, static_argnames="dtype")
def _cast(array: jax.Array, dtype: str) -> jax.Array:
    return jnp.asarray(array).astype(dtype)


@functools.partial(jax.jit, static_argnames="inner")
def _flat(weight: jax.Array, inner: int) -> jax.Array:
    return weight.reshape(math.prod(weight.shape[:inner]), -1)


@functools.partial(jax.jit, static_argnames="form")
def _transposed(head_VD: jax.Array, form: Form) -> Matrix:
    return _matrix((head_VD.T,), form)


@functools.partial(jax.jit, static_argnames="form")
def _matrix(parts_JF: tuple[jax.Array, ...], form: Form) -> Matrix:
    matrix_JF = jnp.concatenate(parts_JF, axis=1)
    return matrices.int8(matrix_JF) if form is Form.INT8 else FloatMatrix(matrix_JF)
