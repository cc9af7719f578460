"""What an engine would run on a machine that is not here: its programs for given sizes, and the shapes of what they take."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import decoding
from kwaicoder_jax.inference.cache import storage_dtype
from kwaicoder_jax.inference.programs import Placement, programs
from kwaicoder_jax.inference.sizes import SMALLEST_CACHE, Sizes, bucket, prompt_chunk
from kwaicoder_jax.inference.weights import Form, Weights, prepare
from kwaicoder_jax.models import ModelConfig, Params, Runtime


@dataclasses.dataclass(frozen=True)
class Load:
    """The sizes that an engine would compile for.

    Attributes:
      rows: decoded together.
      slots: of each row's cache.
      prompt_slots: of a prompt's cache.
      chunk: tokens of it that are run at once.
    """

    rows: int
    slots: int
    prompt_slots: int
    chunk: int

    @classmethod
    def of(cls, config: ModelConfig, rows: int, cache_tokens: int, prompt_tokens: int, placement: Placement | None):
        """The sizes that hold so many rows and tokens, rounded as `Engine` does."""
        for name, value in (("rows", rows), ("cache_tokens", cache_tokens), ("prompt_tokens", prompt_tokens)):
            if value < 1:
                raise UserError(f"{value} is too small", where=name, remedy="use 1 or more")
        if prompt_tokens > cache_tokens:
            what = f"{prompt_tokens} tokens are more than the {cache_tokens} of a row's cache"
            raise UserError(what, where="prompt_tokens", remedy="use fewer, or a longer cache")
        sizes = Sizes(rows, cache_tokens, 1, True, 1 if placement is None else placement.row_shares)
        prompt_slots = sizes.prompt_slots(prompt_tokens)
        return cls(
            sizes.max_rows, bucket(cache_tokens, SMALLEST_CACHE), prompt_slots, prompt_chunk(config, prompt_slots)
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """A jitted function, and shapes with shardings to lower it with."""

    function: Any
    arguments: Mapping[str, Any]

    def lower(self) -> Any:
        """Traced; `.compile()` is next."""
        return self.function.lower(**self.arguments)


def calls(
    params: Params,
    config: ModelConfig,
    load: Load,
    *,
    form: Form | str = Form.FLOAT,
    runtime: Runtime | None = None,
    placement: Placement | None = None,
) -> dict[str, Call]:
    """An engine's two programs: "prefill" runs the next tokens of one prompt, "decode" draws a token for every row.

    Args:
      params: ShapeDtypeStructs with NamedShardings, as `config` declares the parameters.
      config: the model.
      load: the sizes.
      form: see `weights.Form`.
      runtime: how to compute it.
      placement: as for `Engine`; None for one device.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    platform = mesh.devices.flat[0].platform
    made = programs(config, runtime or Runtime(), placement, platform)
    weights: Weights = prepare(params, config, form)
    everywhere = NamedSharding(mesh, PartitionSpec())
    dtype, heads = storage_dtype(config, platform), 1 if config.mla is not None else config.kv_heads

    def shapes(function: Any, shardings: Any) -> Any:
        tree = jax.eval_shape(functools.partial(function, config, cache_dtype=dtype))
        shardings = jax.tree.map(lambda _: everywhere, tree) if placement is None else _spread(shardings(heads), tree)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, shardings
        )

    rows = shapes(
        functools.partial(decoding.empty_rows, rows=load.rows, slots=load.slots), placement and placement.rows
    )
    lengths_P = jnp.ones((1,), jnp.int32)
    prefix = shapes(
        functools.partial(decoding.empty_prefix, slots=load.prompt_slots, length_P=lengths_P),
        placement and placement.prefix,
    )
    tokens_PT = jax.ShapeDtypeStruct((1, load.chunk), jnp.int32)
    return {
        "prefill": Call(made.prefill, {"weights": weights, "prefix": prefix, "tokens_PT": tokens_PT}),
        "decode": Call(made.decode, {"weights": weights, "rows": rows, "top": None}),
    }


def _spread(shardings: Any, tree: Any) -> Any:
    """A tree of shardings, some of which stand for all leaves below them, laid out as `tree`."""
    return jax.tree.map(
        lambda sharding, below: jax.tree.map(lambda _: sharding, below), shardings, tree,
        is_leaf=lambda x: isinstance(x, NamedSharding),
    )  # fmt: skip
