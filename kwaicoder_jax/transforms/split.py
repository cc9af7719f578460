"""Splitting an MLP by width: a partition of its neurons into G shards, applied to gate, up and down alike.

sum_g F_g(x) = F(x) for any partition, because a SwiGLU MLP is a sum over its neurons.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, homes, namespace, spread, whole_along


def check_granularity(granularity: int, mlp_dim: int) -> None:
    """Raises UserError unless G divides F; the remedy lists the divisors nearest to G."""
    if not isinstance(granularity, int | np.integer):
        raise UserError(f"{granularity!r} is no whole number", where="upcycle.granularity")
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
      order_RLF: from `partition.partition`; may name a part of the neurons only.

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
        places = whole_along(array, place, tuple(names))
        array = _take_each(spread(array, places), index, place)
        if places is not None:  # each device orders the replicas that it will hold
            places[1] = homes(array, tuple(names))[1]
        array = spread(array, places)
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
