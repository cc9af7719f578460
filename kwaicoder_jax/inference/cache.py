"""Keys and values as an explicit value: one array per layer, rows that come and go, slots in a ring.

Every decode step writes the newest token of all rows into one slot, `index`, and moves on by one, around the ring. A row of n
tokens thus lies in the n slots behind `index`, whenever it came; what is older has segment 0 and is not seen. So one
update in place serves rows of any length, and a row that leaves needs no compaction.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax import models
from kwaicoder_jax.models import Cache, ModelConfig


@flax.struct.dataclass
class LayerCaches:
    """`models.Cache` with the layers apart, so that a step that is given the arrays updates them in place.

    Attributes:
      keys: of each layer, [B, K, S, N].
      values: the same.
      positions_BS: position of each slot's token in its row.
      segments_BS: 1 where there is a token of the row, else 0.
      index: the slot to be written next, in all rows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    positions_BS: jax.Array
    segments_BS: jax.Array
    index: jax.Array

    @property
    def slots(self) -> int:
        """S."""
        return self.positions_BS.shape[1]

    def stacked(self) -> Cache:
        """As `models.forward` takes it, in a traced function; see `Weights.params`."""
        return Cache(jnp.stack(self.keys), jnp.stack(self.values), self.positions_BS, self.segments_BS, self.index)


def unstacked(cache: Cache) -> LayerCaches:
    """The inverse of `stacked`; around the ring where the index has reached its end."""
    keys, values = (tuple(x[layer] for layer in range(x.shape[0])) for x in (cache.key_LBKSN, cache.value_LBKSN))
    return LayerCaches(keys, values, cache.positions_BS, cache.segments_BS, cache.index % cache.positions_BS.shape[1])


def storage_dtype(config: ModelConfig, platform: str) -> str:
    """The dtype of keys and values: that of the computation, but float32 for bfloat16 on CPU.

    XLA has no update of a bfloat16 array there, and would convert all slots to float32 and back in every step. (Latent
    attention has no product of mixed dtypes, and its caches are small.)
    """
    return "float32" if platform == "cpu" and config.mla is None else config.dtype


def empty(config: ModelConfig, rows: int, slots: int, dtype: str) -> LayerCaches:
    """No token in any row."""
    shapes = jax.eval_shape(lambda: models.empty_cache(config, rows, slots))
    keys, values = (
        tuple(jnp.zeros(x.shape[1:], dtype) for _ in range(x.shape[0])) for x in (shapes.key_LBKSN, shapes.value_LBKSN)
    )
    positions_BS, segments_BS = jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), jnp.int32)
    return LayerCaches(keys, values, positions_BS, segments_BS, jnp.zeros((), jnp.int32))


def _map(function: Any, cache: LayerCaches, *others: LayerCaches) -> LayerCaches:
    """`function(axis of the slots, array, ...)` for everything but the index."""
    return cache.replace(  # type: ignore[attr-defined]
        keys=tuple(function(2, *xs) for xs in zip(cache.keys, *(o.keys for o in others))),
        values=tuple(function(2, *xs) for xs in zip(cache.values, *(o.values for o in others))),
        positions_BS=function(1, cache.positions_BS, *(o.positions_BS for o in others)),
        segments_BS=function(1, cache.segments_BS, *(o.segments_BS for o in others)),
    )


def inserted(cache: LayerCaches, prefix: LayerCaches, source: jax.Array, row: jax.Array) -> LayerCaches:
    """`cache` with the tokens of one row of `prefix` in `row`, in place of whatever was there.

    Args:
      cache: of B rows.
      prefix: of any rows, not more slots, its index at their end or back at 0: last tokens lie in the last slot.
      source: row of `prefix`, int32 scalar.
      row: row of `cache`.
    """

    def insert(axis: int, into: jax.Array, new: jax.Array) -> jax.Array:
        new = jax.lax.dynamic_slice_in_dim(new, source, 1)
        padding = [(0, 0)] * new.ndim
        padding[axis] = (into.shape[axis] - new.shape[axis], 0)
        rolled = jnp.roll(jnp.pad(new, padding), cache.index, axis)  # the last slot comes to stand before the index
        return jax.lax.dynamic_update_slice_in_dim(into, rolled, row, 0)

    return _map(insert, cache, prefix)


def resized(cache: LayerCaches, rows_B: jax.Array, slots: int) -> LayerCaches:
    """A cache of other rows and slots, with index 0; all rows must fit into the new slots.

    Args:
      cache: the old one.
      rows_B: which old row comes to stand in each new one; -1 for an empty row.
      slots: the new number of slots.
    """

    def resize(axis: int, old: jax.Array) -> jax.Array:
        chosen = jnp.roll(jnp.take(old, jnp.maximum(rows_B, 0), axis=0), -cache.index, axis)  # the oldest slot first
        more, sides = slots - old.shape[axis], [(0, 0)] * old.ndim
        if more < 0:
            return jax.lax.slice_in_dim(chosen, -more, old.shape[axis], axis=axis)
        sides[axis] = (more, 0)
        return jnp.pad(chosen, sides)

    new = _map(resize, cache)
    segments_BS = jnp.where((rows_B >= 0)[:, None], new.segments_BS, 0)
    return new.replace(segments_BS=segments_BS, index=jnp.zeros_like(cache.index))  # type: ignore[attr-defined]
