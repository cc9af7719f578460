"""Splitting an MLP by width: a partition of its neurons into G shards, applied to gate, up and down alike.

sum_g F_g(x) = F(x) for any partition, because a SwiGLU MLP is a sum over its neurons.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, namespace


class Partition(enum.StrEnum):
    """Which neurons form a shard."""

    CONTIGUOUS = "contiguous"  # neurons g*F/G to (g+1)*F/G; a reshape, so nothing moves between devices
    BALANCED = "balanced"  # dealt out by importance, so that shards weigh about the same; needs scores
    RANDOM_PER_REPLICA = "random_per_replica"  # another random partition for every replica; the merge stays exact


def partition(
    method: str,
    *,
    mlp_dim: int,
    granularity: int,
    replicas: int = 1,
    seed: int = 0,
    neurons_LF: np.ndarray | None = None,
) -> np.ndarray | None:
    """The order in which neurons are laid out before they are cut into G equal runs.

    Args:
      method: a value of Partition.
      mlp_dim: F.
      granularity: G, a divisor of F.
      replicas: R.
      seed: of the random partitions; all layers share them.
      neurons_LF: scores, for "balanced".

    Returns:
      None for the order as it is, else indices [R or 1, L or 1, F], ascending inside each shard.

    Raises:
      UserError: an unknown method, G does not divide F, or "balanced" without scores.
    """
    check_granularity(granularity, mlp_dim)
    try:
        chosen = Partition(method)
    except ValueError as error:
        raise UserError(
            f"no partition {method!r}", where="upcycle.partition", remedy=f"use {', '.join(Partition)}"
        ) from error
    if chosen is Partition.CONTIGUOUS:
        return None
    if chosen is Partition.BALANCED:
        if neurons_LF is None:
            raise UserError(
                "a balanced partition needs scores", where="upcycle.partition", remedy="pass scores, or use contiguous"
            )
        order_RLF = _deal(neurons_LF, granularity)[None]
    else:
        generator = np.random.default_rng(seed)
        order_RLF = np.stack([generator.permutation(mlp_dim) for _ in range(replicas)])[:, None]
    runs = order_RLF.reshape(*order_RLF.shape[:2], granularity, -1)
    return np.sort(runs, axis=-1).reshape(order_RLF.shape)


def _deal(scores_LF: np.ndarray, granularity: int) -> np.ndarray:
    """Deals neurons from the best down to G shards, forth and back (0 .. G-1, G-1 .. 0), so that sums come close."""
    ranked_LNG = np.argsort(-scores_LF, axis=-1, kind="stable").reshape(len(scores_LF), -1, granularity)
    ranked_LNG = ranked_LNG.copy()
    ranked_LNG[:, 1::2] = ranked_LNG[:, 1::2, ::-1]
    return ranked_LNG.swapaxes(1, 2).reshape(scores_LF.shape)


def check_granularity(granularity: int, mlp_dim: int) -> None:
    """Raises UserError unless G divides F; the remedy lists the divisors nearest to G."""
    if granularity >= 1 and mlp_dim % granularity == 0:
        return
    divisors = [d for d in range(1, mlp_dim + 1) if mlp_dim % d == 0]
    wanted = max(granularity, 1)
    near = sorted(sorted(divisors, key=lambda d: max(d / wanted, wanted / d))[:4])
    raise UserError(
        f"{granularity} does not divide the {mlp_dim} neurons of the MLP", where="upcycle.granularity",
        remedy=f"divisors nearby: {', '.join(map(str, near))}",
    )  # fmt: skip


def shards(
    array: Array, axes: tuple[str, ...], granularity: int, order_RLF: Array | None = None
) -> tuple[Array, tuple[str, ...]]:
    """Cuts the "mlp" axis of one parameter into G shards, each F/G wide.

    Args:
      array: a parameter with leading "layers" axis, as in [L, D, F] or [L, F, D].
      axes: its declared axes.
      granularity: G.
      order_RLF: from `partition`.

    Returns:
      The array and its axes, which begin with ("layers", "replica", "shard"): [L, R or 1, G, ...]; "mlp" has become
      "expert_mlp". Only reshapes and transposes, unless there is an order.
    """
    xp = namespace(array)
    array = xp.expand_dims(array, 1)
    names = ["layers", "replica", *axes[1:]]
    place = names.index("mlp")
    if order_RLF is not None:
        order_LRF = xp.swapaxes(xp.asarray(order_RLF), 0, 1)
        index = order_LRF.reshape(*order_LRF.shape[:2], *(-1 if n == "mlp" else 1 for n in names[2:]))
        array = _take_each(array, index, place)
    array = array.reshape(*array.shape[:place], granularity, -1, *array.shape[place + 1 :])
    names[place : place + 1] = ["shard", "expert_mlp"]
    array = xp.moveaxis(array, place, 2)
    names.insert(2, names.pop(place))
    return array, tuple(names)


def _take_each(array: Array, index: Array, axis: int) -> Array:
    """`take_along_axis` where array and index broadcast against each other over layers (0) and replicas (1)."""
    if isinstance(array, np.ndarray):
        return np.take_along_axis(array, index, axis=axis)
    layers, replicas = max(array.shape[0], index.shape[0]), index.shape[1]
    flat_LRF = jnp.broadcast_to(index, (layers, replicas, *index.shape[2:])).reshape(layers, replicas, -1)

    def one_layer(x: jax.Array, order_RF: jax.Array) -> jax.Array:
        return jax.vmap(lambda order_F: jnp.take(x, order_F, axis=axis - 2))(order_RF)

    return jax.vmap(one_layer)(array[:, 0], flat_LRF)
