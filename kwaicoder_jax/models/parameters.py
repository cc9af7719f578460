"""Parameters as data: what a config declares, how to make them, how to run a model on them."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from kernels.grouped_matmul import ScaledMatrices
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.attention import Cache
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.statistics import COLLECTION
from kwaicoder_jax.models.stored import StoredMatrix
from kwaicoder_jax.models.transformer import Output, Transformer

AS_STORED = ("scale", "bias", "router", "shared_gate")  # ends of names: small, and most of them read in float32

Params = Any  # one nested dict of arrays; layer parameters carry a leading layer axis


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One parameter as its module declares it: shape, dtype and the name of each of its axes.

    Attributes:
      shape: with a leading axis of layers inside a stack.
      dtype: as it is stored.
      axes: the logical name of each axis.
      kind: "scale" of a norm, "bias" (added to something), or "matrix" (multiplies activations, or is looked up in).
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str, ...]
    kind: Literal["matrix", "bias", "scale"] = "matrix"

    def axis(self, name: str) -> int | None:
        """The position of the axis called `name`, or None."""
        return self.axes.index(name) if name in self.axes else None

    @property
    def inner_axes(self) -> tuple[str, ...]:
        """The axes of one layer."""
        return self.axes[1:] if self.axes[:1] in (("layers",), ("dense_layers",)) else self.axes

    @property
    def of_experts(self) -> bool:
        """Whether it belongs to the routed experts, one part to each; the router does not."""
        return self.inner_axes[:1] == ("experts",) and len(self.inner_axes) > 1

    @property
    def writes(self) -> bool:
        """Whether what it makes is added to the residual stream."""
        return self.kind != "scale" and self.inner_axes != self.axes and self.axes[-1] == "embed"


def _example(length: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    tokens_BT = jnp.zeros((1, length), jnp.int32)
    return tokens_BT, tokens_BT, jnp.ones_like(tokens_BT)


@functools.lru_cache(maxsize=64)
def _declarations(config: ModelConfig) -> dict[str, Declaration]:
    boxed = jax.eval_shape(lambda key: Transformer(config).init(key, *_example())["params"], jax.random.key(0))
    flat = flax.traverse_util.flatten_dict(boxed, sep="/")
    return {name: Declaration(box.value.shape, box.value.dtype, box.names, _kind(name)) for name, box in flat.items()}


def _kind(name: str) -> Literal["matrix", "bias", "scale"]:
    """By the last part of the name, a convention that the modules keep: "scale", "query_bias", "gate"."""
    if name.endswith("/scale"):
        return "scale"
    return "bias" if name.endswith("bias") else "matrix"


def declarations(config: ModelConfig) -> dict[str, Declaration]:
    """What `config` declares: {"layers/mlp/gate": Declaration, ...}. Makes no array."""
    return dict(_declarations(config))


def flatten(params: Params) -> dict[str, Any]:
    """{"layers/mlp/gate": array} from the nested dict."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters as `config` declares them."""
    return nn.meta.unbox(Transformer(config).init(key, *_example())["params"])


def abstract(config: ModelConfig) -> Params:
    """The parameters as ShapeDtypeStructs."""
    return unflatten({name: jax.ShapeDtypeStruct(d.shape, d.dtype) for name, d in _declarations(config).items()})


def count(config: ModelConfig) -> int:
    """Number of parameters."""
    return sum(math.prod(d.shape) for d in _declarations(config).values())


def count_active(config: ModelConfig) -> int:
    """Number of parameters that one token uses: of E experts, X."""
    experts = config.experts
    if experts is None:
        return count(config)
    per_expert = sum(math.prod(d.shape) // experts.num_experts for d in _declarations(config).values() if d.of_experts)
    return count(config) - per_expert * (experts.num_experts - experts.experts_per_token)


def check(params: Params, config: ModelConfig, where: str = "params") -> None:
    """Raises UserError if `params` is not what `config` declares (names and shapes)."""
    flat, declared = flatten(params), _declarations(config)
    for name in sorted(set(flat) ^ set(declared)):
        problem = "missing" if name in declared else "not a parameter of this config"
        raise UserError(
            f"{name}: {problem}", where=where, remedy="use the config that these parameters were saved with"
        )
    for name, d in declared.items():
        if tuple(flat[name].shape) != d.shape:
            raise UserError(f"{name} has shape {tuple(flat[name].shape)}, the config says {d.shape}", where=where)


def forward(
    params: Params,
    config: ModelConfig,
    inputs_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    *,
    runtime: Runtime | None = None,
    cache: Cache | None = None,
    collect_layers: bool = False,
    statistics: bool = False,
    capacity_factor: float | None = None,
) -> Output:
    """Runs the decoder. Segment 0 is padding; tokens see only their own segment, at or before their position.

    Args:
      params: as `config` declares them.
      config: the model.
      inputs_BT: token ids.
      positions_BT: position of each token inside its segment.
      segments_BT: segment of each token.
      runtime: how to compute it.
      cache: keys and values of earlier tokens; the new ones are added and the cache comes back in the output.
      collect_layers: also return the residual stream after each layer.
      statistics: also return the activation statistics that the modules record (see `models.statistics`).
      capacity_factor: of a mixture in training: the rows that an expert takes of each sequence, over those of even
        routing. What is beyond adds nothing to its token. None drops nothing, and is what a model is otherwise.

    Raises:
      ValueError: statistics of a mixture that drops tokens.
    """
    if statistics and capacity_factor is not None:
        raise ValueError("statistics are those of a model that drops nothing: leave out capacity_factor")
    model = Transformer(config, runtime or Runtime(), collect_layers, capacity_factor)
    params = _narrowed(params, config)
    arguments = (inputs_BT, positions_BT, segments_BT, cache)
    if not statistics:
        return model.apply({"params": params}, *arguments)  # type: ignore[return-value]
    output, recorded = model.apply({"params": params}, *arguments, mutable=[COLLECTION])
    return output.replace(statistics=recorded[COLLECTION])  # type: ignore[union-attr]


def _narrowed(params: Params, config: ModelConfig) -> Params:
    """The layers' matrices in the dtype of the computation, if that is narrower; the others as they are.

    All layers at once, before the loop over them: XLA would cast them there anyway, and gradients are then stacked in the
    narrow dtype, in which each layer computes them, and not in that of the parameters.
    """

    def cast(path: str, leaf: Any) -> Any:
        in_layers = path.startswith(("layers/", "dense_layers/"))
        if not in_layers or path.endswith(AS_STORED) or isinstance(leaf, StoredMatrix | ScaledMatrices):
            return leaf
        return leaf.astype(config.dtype) if jnp.dtype(config.dtype).itemsize < leaf.dtype.itemsize else leaf

    return unflatten({path: cast(path, leaf) for path, leaf in flatten(params).items()})


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache of `slots` tokens for `batch` rows."""
    heads, key_width, value_width = config.kv_heads, config.head_dim, config.head_dim
    if config.mla is not None:
        heads, key_width, value_width = 1, config.mla.rope_dim, config.mla.kv_rank
    key_LBKSN, value_LBKSN = (
        jnp.zeros((config.layers, batch, heads, slots, width), config.dtype) for width in (key_width, value_width)
    )
    zeros_BS = jnp.zeros((batch, slots), jnp.int32)
    return Cache(key_LBKSN, value_LBKSN, zeros_BS, zeros_BS, jnp.zeros((), jnp.int32))
