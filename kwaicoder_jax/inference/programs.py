"""The compiled forms of `decoding`, shared by all engines of one model, and where their arrays lie on a mesh."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kwaicoder_jax.inference import decoding
from kwaicoder_jax.inference.cache import LayerCaches, storage_dtype
from kwaicoder_jax.inference.decoding import Prefix, Rows
from kwaicoder_jax.models import ModelConfig, Runtime

# By platform. TPU: an array is brought on chip only where all of it is read there. Otherwise XLA brings a cache on chip to
# write one slot into it, and moves all of it back: a copy of the whole cache in every step.
OPTIONS = {"tpu": {"xla_tpu_msa_inefficient_use_to_copy_ratio": "1.0"}}


@dataclasses.dataclass(frozen=True)
class Placement:
    """How rows and caches lie on a mesh.

    Attributes:
      mesh: that the weights lie on.
      row_axes: mesh axes that share the rows.
      head_axis: mesh axis that shares the heads of keys and values, where it divides their number.
    """

    mesh: Mesh
    row_axes: tuple[str, ...] = ()
    head_axis: str | None = None

    @property
    def row_shares(self) -> int:
        """The number of rows is a multiple of this."""
        return math.prod(self.mesh.shape[axis] for axis in self.row_axes)

    def caches(self, heads: int, *, rows: bool) -> LayerCaches:
        """The shardings of a cache of `heads` heads; `rows=False` is for prompts, which every row's device has."""
        row_axes = self.row_axes if rows else None
        shared = self.head_axis is not None and heads % self.mesh.shape[self.head_axis] == 0
        heads_BKSN = self._at(row_axes, self.head_axis if shared else None)
        return LayerCaches(heads_BKSN, heads_BKSN, self._at(row_axes), self._at(row_axes), self._at())  # type: ignore[arg-type]

    def rows(self, heads: int) -> Rows:
        """The shardings of rows."""
        at_B: Any = self._at(self.row_axes)
        return Rows(self.caches(heads, rows=True), at_B, at_B, at_B, at_B)

    def prefix(self, heads: int) -> Prefix:
        """The shardings of prompts that were run."""
        everywhere: Any = self._at()
        return Prefix(self.caches(heads, rows=False), everywhere, everywhere)

    def everywhere(self) -> NamedSharding:
        """The same array on every device."""
        return self._at()

    def _at(self, *axes: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*axes))


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted functions; each compiles once for every size of rows, slots or prompt that it meets."""

    empty_prefix: Callable[..., Prefix]
    prefill: Callable[..., Prefix]
    empty_rows: Callable[..., Rows]
    join: Callable[..., Any]
    leave: Callable[..., Rows]
    decode: Callable[..., Any]
    resize: Callable[..., Rows]


@functools.lru_cache(maxsize=16)
def programs(config: ModelConfig, runtime: Runtime, placement: Placement | None, platform: str) -> Programs:
    """The programs of one model; engines that come and go (one for each benchmark, say) compile nothing anew.

    Args:
      config: the model.
      runtime: how to compute it; layers are unrolled whatever it says.
      placement: on a mesh, or None for one device.
      platform: that the weights are on.
    """
    runtime = dataclasses.replace(runtime, scan_unroll=0)
    prefix = rows = everywhere = None
    if placement is not None:
        heads = 1 if config.mla is not None else config.kv_heads
        prefix, rows, everywhere = placement.prefix(heads), placement.rows(heads), placement.everywhere()
    drawn = None if everywhere is None else (rows, everywhere)
    model: dict[str, Any] = {"config": config, "runtime": runtime}
    new: dict[str, Any] = {"config": config, "cache_dtype": storage_dtype(config, platform)}
    return Programs(
        empty_prefix=jax.jit(
            functools.partial(decoding.empty_prefix, **new), static_argnames="slots", out_shardings=prefix
        ),
        prefill=jax.jit(functools.partial(decoding.prefill, **model), donate_argnames="prefix", out_shardings=prefix),
        empty_rows=jax.jit(
            functools.partial(decoding.empty_rows, **new), static_argnames=("rows", "slots"), out_shardings=rows
        ),
        join=jax.jit(decoding.join, static_argnames="top", donate_argnames="rows", out_shardings=drawn),
        leave=jax.jit(decoding.leave, donate_argnames="rows", out_shardings=rows),
        decode=jax.jit(
            functools.partial(decoding.decode, **model),
            static_argnames="top", donate_argnames="rows", out_shardings=drawn, compiler_options=OPTIONS.get(platform),
        ),
        resize=jax.jit(decoding.resize, static_argnames="slots", out_shardings=rows),
    )  # fmt: skip
