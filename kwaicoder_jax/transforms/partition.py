"""Which neurons go where: an always-on shared set, and a partition of the rest into G equal shards per replica.

Any partition keeps the function, and every replica may have its own: sum_g F_g(x) = F(x) whatever the index sets.
"""

import enum

import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.clustering import balanced_clusters
from kwaicoder_jax.transforms.coactivation import CoActivation
from kwaicoder_jax.transforms.split import check_granularity


class Partition(enum.StrEnum):
    """Which neurons form a shard."""

    CONTIGUOUS = "contiguous"  # neurons g*F/G to (g+1)*F/G; a reshape, so nothing moves between devices
    BALANCED = "balanced"  # dealt out by importance, so that shards weigh about the same; needs scores
    BALANCED_PER_REPLICA = "balanced_per_replica"  # the same, dealt in another random order for every replica
    RANDOM = "random"  # one random partition
    RANDOM_PER_REPLICA = "random_per_replica"  # another random partition for every replica
    COACTIVATION = "coactivation"  # neurons that fire on the same tokens; needs co-activation statistics


def partition(
    method: str,
    *,
    mlp_dim: int,
    granularity: int,
    replicas: int = 1,
    seed: int = 0,
    neurons_LF: np.ndarray | None = None,
    coactivation: CoActivation | None = None,
    shared_LS: np.ndarray | None = None,
) -> np.ndarray | None:
    """The order in which the routed neurons are laid out before they are cut into G equal runs.

    Args:
      method: a value of Partition for all replicas, or R of them, separated by commas.
      mlp_dim: F.
      granularity: G, a divisor of F, or of F - S.
      replicas: R.
      seed: of random partitions, which all layers share, and of clusters.
      neurons_LF: importance, for "balanced" and "balanced_per_replica".
      coactivation: statistics, for "coactivation".
      shared_LS: neurons of the shared expert, which are not routed.

    Returns:
      None for the order as it is, else indices into the F neurons [R or 1, L or 1, F - S], ascending inside each shard.

    Raises:
      UserError: an unknown method, G does not divide F, or a method without the statistics that it needs.
    """
    methods = _parse(method, replicas)
    routed = mlp_dim - (0 if shared_LS is None else shared_LS.shape[1])
    check_granularity(granularity, routed)
    rest_LP = None if shared_LS is None else _complement(shared_LS, mlp_dim)
    options = (routed, granularity, neurons_LF, coactivation, rest_LP)
    if len(methods) == 1:
        order_RLP = _one(methods[0], replicas, seed, *options)
    else:
        order_RLP = _beside([_one(each, 1, seed + r, *options) for r, each in enumerate(methods)], routed)
    if order_RLP is None:
        return None if rest_LP is None else rest_LP[None]
    order_RLP = np.sort(order_RLP.reshape(*order_RLP.shape[:2], granularity, -1), axis=-1).reshape(order_RLP.shape)
    return order_RLP if rest_LP is None else _named(order_RLP, rest_LP)


def _named(order_RLP: np.ndarray, rest_LP: np.ndarray) -> np.ndarray:
    """Positions among the routed neurons [R, L or 1, P] as indices of neurons, [R, L, P]."""
    shape = (len(order_RLP), *rest_LP.shape)
    return np.take_along_axis(np.broadcast_to(rest_LP, shape), np.broadcast_to(order_RLP, shape), axis=-1)


def _beside(orders: list[np.ndarray | None], routed: int) -> np.ndarray:
    """Replicas' own orders [1, L or 1, P] as one [R, L or 1, P]."""
    filled = [np.arange(routed)[None, None] if order is None else order for order in orders]
    layers = max(order.shape[1] for order in filled)
    return np.concatenate([np.broadcast_to(order, (1, layers, routed)) for order in filled])


def _one(
    method: Partition, replicas: int, seed: int, routed: int, granularity: int, neurons_LF: np.ndarray | None,
    coactivation: CoActivation | None, rest_LP: np.ndarray | None,
) -> np.ndarray | None:  # fmt: skip
    """One method's order [R or 1, L or 1, P], of positions among the routed neurons; runs are not sorted yet."""
    generator = np.random.default_rng(seed)
    if method is Partition.CONTIGUOUS:
        return None
    if method is Partition.RANDOM:
        return generator.permutation(routed)[None, None]
    if method is Partition.RANDOM_PER_REPLICA:
        return np.stack([generator.permutation(routed) for _ in range(replicas)])[:, None]
    if method is Partition.COACTIVATION:
        if coactivation is None:
            raise UserError(
                "a co-activation partition needs statistics", where="upcycle.partition",
                remedy="pass what coactivation.collect returns, or use contiguous",
            )  # fmt: skip
        return _clusters(coactivation, granularity, seed, rest_LP)[None]
    if neurons_LF is None:
        raise UserError(
            "a balanced partition needs scores", where="upcycle.partition", remedy="pass scores, or use contiguous"
        )
    if rest_LP is not None:
        neurons_LF = np.take_along_axis(neurons_LF, rest_LP, axis=-1)
    if method is Partition.BALANCED:
        return _deal(neurons_LF, granularity)[None]
    return np.stack([_deal(neurons_LF, granularity, generator) for _ in range(replicas)])


def _parse(method: str, replicas: int) -> list[Partition]:
    try:
        methods = [Partition(name.strip()) for name in str(method).split(",")]
    except ValueError as error:
        raise UserError(
            f"no partition {method!r}", where="upcycle.partition", remedy=f"use {', '.join(Partition)}"
        ) from error
    if len(methods) not in (1, replicas):
        raise UserError(
            f"{len(methods)} partitions for {replicas} replicas", where="upcycle.partition",
            remedy="name one, or one for each replica",
        )  # fmt: skip
    return methods


def _deal(scores_LF: np.ndarray, granularity: int, generator: np.random.Generator | None = None) -> np.ndarray:
    """Deals neurons from the best down to G shards, forth and back (0 .. G-1, G-1 .. 0), so that sums come close.

    With a generator, each time forth and back in a new order of the shards.
    """
    ranked_LNG = np.argsort(-scores_LF, axis=-1, kind="stable").reshape(len(scores_LF), -1, granularity).copy()
    ranked_LNG[:, 1::2] = ranked_LNG[:, 1::2, ::-1]
    if generator is not None:
        rounds = -(-ranked_LNG.shape[1] // 2)
        turn_LNG = generator.permuted(
            np.broadcast_to(np.arange(granularity), (len(scores_LF), rounds, granularity)), axis=-1
        )
        turn_LNG = np.repeat(turn_LNG, 2, axis=1)[:, : ranked_LNG.shape[1]]
        ranked_LNG = np.take_along_axis(ranked_LNG, turn_LNG, axis=-1)
    return ranked_LNG.swapaxes(1, 2).reshape(scores_LF.shape)


def _clusters(coactivation: CoActivation, granularity: int, seed: int, rest_LP: np.ndarray | None) -> np.ndarray:
    """Layers' neurons in the order of their clusters, [L, P]."""
    orders = []
    for layer in range(coactivation.layers):
        rest_P = None if rest_LP is None else rest_LP[layer]
        label_P = balanced_clusters(coactivation.profiles(layer, rest_P), granularity, seed=seed)
        orders.append(np.argsort(label_P, kind="stable"))
    return np.stack(orders)


def shared_neurons(count: int, *, mlp_dim: int, granularity: int, neurons_LF: np.ndarray | None) -> np.ndarray | None:
    """The S most important neurons of each layer, which form the shared expert: [L, S], ascending; None for S = 0.

    Args:
      count: S; G has to divide what is left.
      mlp_dim: F.
      granularity: G.
      neurons_LF: importance.
    """
    if count == 0:
        return None
    if not 0 < count < mlp_dim or (mlp_dim - count) % granularity:
        good = [s for s in range(mlp_dim) if (mlp_dim - s) % granularity == 0]
        near = sorted(sorted(good, key=lambda s: abs(s - count))[:4])
        raise UserError(
            f"{count} of {mlp_dim} neurons leave {mlp_dim - count}, which {granularity} shards cannot share",
            where="upcycle.shared_neurons", remedy=f"values nearby: {', '.join(map(str, near))}",
        )  # fmt: skip
    if neurons_LF is None:
        raise UserError(
            "a shared expert is made of the most important neurons", where="upcycle.shared_neurons",
            remedy="pass scores, or use 0",
        )  # fmt: skip
    return np.sort(np.argsort(-neurons_LF, axis=-1, kind="stable")[:, :count], axis=-1)


def _complement(shared_LS: np.ndarray, mlp_dim: int) -> np.ndarray:
    """The other neurons, ascending: [L, F - S]."""
    return np.stack([np.setdiff1d(np.arange(mlp_dim), shared_S) for shared_S in shared_LS])
