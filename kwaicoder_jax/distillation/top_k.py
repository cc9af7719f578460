"""`jax.lax.top_k` that stays where the rows are.

XLA's partitioner knows no way to split its TopK by rows and gathers the whole operand on every device: of logits, that
is the array [tokens, vocabulary] of the whole mesh. The rows are independent, so each device may do its own.
"""

import functools
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


@functools.partial(custom_partitioning, static_argnums=(1,))
def top_k(x_BWV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of the last axis, largest first, and their places; [B, W, K] float and int32."""
    values_BWK, places_BWK = jax.lax.top_k(x_BWV, count)
    return values_BWK, places_BWK


def _rows(sharding: Any, mesh: Any) -> NamedSharding:
    """The operand's sharding with its last axis whole."""
    spec = [*sharding.spec, None, None, None][:2]
    return NamedSharding(mesh, PartitionSpec(*spec, None))


def _infer(count: int, mesh: Any, operands: Any, results: Any) -> Any:
    del count, results
    return (_rows(operands[0].sharding, mesh),) * 2


def _partition(count: int, mesh: Any, operands: Any, results: Any) -> Any:
    del results
    rows = _rows(operands[0].sharding, mesh)
    return mesh, lambda x_BWV: tuple(jax.lax.top_k(x_BWV, count)), (rows, rows), (rows,)


top_k.def_partition(
    partition=_partition, infer_sharding_from_operands=_infer, sharding_rule="b w v -> b w k, b w k",
    need_replication_factors=("v", "k"),
)  # fmt: skip
