"""Parameters as decode steps read them: every layer's arrays of their own, in the dtype and the form of the computation.

A decode step is bound by reading weights. A slice of a stack of layers is an array that has to be made before it is read
(on CPU), and so is a weight in another dtype: both are done once, here.
"""

import enum
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.inference import matrices
from kwaicoder_jax.models import ModelConfig, Params, StoredMatrix

STACKS = ("dense_layers", "layers")
# Weights that the model reads through `models.layers.project`, and how many of their axes that contracts.
PROJECTED = {"query": 1, "key": 1, "value": 1, "gate": 1, "up": 1, "down": 1, "out": 2} | {
    "query_down": 1, "query_up": 1, "kv_down": 1,
}  # fmt: skip
AS_STORED = ("scale", "bias", "router", "shared_gate")  # ends of names: small, and most of them read in float32


class Form(enum.StrEnum):
    """How matrices are stored."""

    AUTO = "auto"  # tiled for one CPU, else plain
    PLAIN = "plain"  # as declared
    TILED = "tiled"  # see `matrices.TiledMatrix`
    INT8 = "int8"  # see `matrices.Int8Matrix`; routed experts stay plain


@flax.struct.dataclass
class Weights:
    """What `prepare` makes.

    Attributes:
      stacks: of each stack of layers, one tree of parameters per layer.
      rest: the parameters of no layer, without the head.
      head: the vocabulary projection, [V, D] or stored.
      tied: whether the model reads the embedding as its head.
    """

    stacks: dict[str, tuple[Params, ...]]
    rest: Params
    head: jax.Array | StoredMatrix
    tied: bool = flax.struct.field(pytree_node=False)

    def params(self) -> Params:
        """The tree that `models.forward` reads; for a traced function that unrolls the layers (`scan_unroll=0`).

        XLA takes the slice of a stack for the operand that it is, so that nothing is copied.
        """
        head = {} if self.tied else {"head": self.head}
        stacks = {
            name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) for name, layers in self.stacks.items()
        }
        return self.rest | head | stacks

    def logits(self, hidden_MD: jax.Array) -> jax.Array:
        """Float32 logits, [M, V]."""
        if isinstance(self.head, StoredMatrix):
            return self.head.multiply(hidden_MD, jnp.float32)
        return models.logits(hidden_MD[None], self.head)[0]


def prepare(params: Params, config: ModelConfig, form: Form | str = Form.AUTO) -> Weights:
    """Copies parameters into the form of an engine; drop `params` afterwards to have their memory back.

    Args:
      params: as `config` declares them; on a mesh each layer keeps its sharding.
      config: the model; weights get its `dtype`.
      form: how matrices are stored.
    """
    form = _resolve(Form(form), params)
    stacks = {}
    for name in (name for name in STACKS if name in params):
        flat = models.flatten(params[name])
        count = len(next(iter(flat.values())))
        layers = [
            {key: _store(leaf, layer, key, config.dtype, form) for key, leaf in flat.items()} for layer in range(count)
        ]
        stacks[name] = tuple(models.unflatten(layer) for layer in layers)
    rest = {name: value for name, value in params.items() if name not in (*STACKS, "head")}
    rest["embedding"] = jnp.asarray(rest["embedding"]).astype(config.dtype)
    tied = "head" not in params
    head_VD = rest["embedding"] if tied else jnp.asarray(params["head"]).astype(config.dtype)
    head = head_VD if form is Form.PLAIN else _stored(head_VD.T, 1, form)
    return Weights(stacks, rest, head, tied)


def _resolve(form: Form, params: Params) -> Form:
    if form is not Form.AUTO:
        return form
    leaf = jax.tree.leaves(params)[0]
    devices = leaf.devices() if isinstance(leaf, jax.Array) else {jax.devices()[0]}
    return Form.TILED if len(devices) == 1 and next(iter(devices)).platform == "cpu" else Form.PLAIN


@functools.partial(jax.jit, static_argnames=("name", "dtype", "form"))
def _store(stacked: jax.Array, layer: Any, name: str, dtype: str, form: Form) -> jax.Array | StoredMatrix:
    """One layer of one parameter; `name` is its path in the layer."""
    weight = jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
    *module, last = name.split("/")
    if last.endswith(AS_STORED):
        return weight
    weight = weight.astype(dtype)
    if form is Form.PLAIN or last not in PROJECTED or module == ["moe"]:  # routed experts
        return weight
    return _stored(weight, PROJECTED[last], form)


@functools.partial(jax.jit, static_argnames=("inner", "form"))
def _stored(weight: jax.Array, inner: int, form: Form) -> StoredMatrix:
    return (matrices.int8 if form is Form.INT8 else matrices.tiled)(weight, inner)
