"""The way back: one dense MLP from the experts of a replica, or from the mean of all replicas.

Undoes `upcycle` with its record: shards are joined, the factor is divided out, neurons return to their places and shared
neurons to theirs. For a mixture that was not trained this is the dense model: to the bit where a matrix's factor is a
power of two (and nothing overflows), else within one unit in the last place, the error of a product and a quotient.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import parameterwise, upcycle
from kwaicoder_jax.transforms.arrays import Array, namespace, take

Record = parameterwise.Record
_SHARED_BIAS = "/shared/down_bias"  # zero when it was made, so that no factor is recorded
AVERAGE = "average"


def apply(
    params: models.Params, config: models.ModelConfig, record: Record, *, replica: int | str | None = None
) -> tuple[models.Params, models.ModelConfig, Record]:
    """Folds a mixture into a dense model.

    The router, its bias and the shared expert's gate are left behind; what a trained gate did is lost (the shared
    neurons come back as if it were still at 1/2).

    Args:
      params: of the mixture; numpy, device or sharded arrays, and the result is of the same kind.
      config: the mixture.
      record: of `upcycle.apply`.
      replica: which replica becomes the MLP; default the first that no neuron was dropped from. "average" takes the mean
        of those, neuron by neuron, and reports how far apart they are.

    Returns:
      Dense parameters, dense config, and a JSON-able record: replica; replicas, those that were used; spread, for
      "average": parameter name to the root mean square over replicas and entries of the distance from the mean, over
      that of the mean; upcycle, the record that was undone; config_before, config_after.

    Raises:
      UserError: a replica that does not exist or that neurons were dropped from, a record of another model.
    """
    undone = plan(record, replica)
    dense, dense_config = replay(params, config, undone)
    if replica == AVERAGE:
        flat = models.flatten(params)
        undone["spread"] = {
            name: spread(undone, name, {source: flat[source] for source in sources(undone, name)})
            for name in models.declarations(dense_config)
            if _is_mlp(undone, name)
        }
    return dense, dense_config, undone


def plan(record: Record, replica: int | str | None = None) -> Record:
    """The record of the way back, without touching a parameter; arguments and errors as in `apply`."""
    parameterwise.configs(record)
    dropped = record["drop"]["replicas"]
    intact = [r for r in range(record["replicas"]) if r not in dropped]
    if not intact:
        raise UserError(
            "neurons of every replica were drawn anew", where="fold.replica", remedy="fold the model it was made from"
        )
    if isinstance(replica, str) and replica != AVERAGE:
        raise UserError(f"no replica {replica!r}", where="fold.replica", remedy=f"use an index or {AVERAGE}")
    if isinstance(replica, int) and replica not in intact:
        raise UserError(
            f"replica {replica} is not whole", where="fold.replica", remedy=f"use one of {intact}, or {AVERAGE}"
        )
    used = intact if replica == AVERAGE else [intact[0] if replica is None else replica]
    return {
        "replica": replica,
        "replicas": used,
        "upcycle": record,
        "config_before": record["config_after"],
        "config_after": record["config_before"],
    }


def replay(
    params: models.Params, config: models.ModelConfig, record: Record
) -> tuple[models.Params, models.ModelConfig]:
    """Folds `params` as `record` says, also one read back from JSON."""
    dense = parameterwise.replay(sys.modules[__name__], params, config, record)
    return dense, parameterwise.configs(record)[1]


def sources(record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
    """See `parameterwise.Transform`."""
    mixture, dense = parameterwise.configs(record)
    declared = models.declarations(mixture)
    if name in declared:
        return {name: layer if "layers" in declared[name].axes else None}
    dense_declared = models.declarations(dense)
    made_of = [*record["upcycle"]["factors"], *(n for n in declared if n.endswith(_SHARED_BIAS))]
    return {other: layer for other in made_of if upcycle.dense_name(dense_declared, other) == name}


def parameter(record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
    """See `parameterwise.Transform`: passed on, or the replica's experts joined."""
    if name in arrays:
        return arrays[name]
    return _mean(_replicas(record, name, arrays, layer))


def _mean(arrays: list[Array]) -> Array:
    first, *others = arrays
    if not others:
        return first
    # The mean as first + mean of differences: replicas that are still equal come back as they are.
    wide = np.promote_types(first.dtype, np.float32)
    differences = [other.astype(wide) - first.astype(wide) for other in others]
    total = differences[0]
    for difference in differences[1:]:
        total = total + difference
    return (first.astype(wide) + _over(total, float(len(others) + 1))).astype(first.dtype)


def spread(record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> float:
    """How far apart the replicas are: see `apply`. Arguments as of `parameter`."""
    replicas = [np.asarray(x, np.float64) for x in _replicas(record, name, arrays, layer)]
    mean = sum(replicas) / len(replicas)
    distance = np.mean([np.mean((x - mean) ** 2) for x in replicas])
    return float(np.sqrt(distance / max(float(np.mean(mean**2)), 1e-300)))


def _is_mlp(record: Record, name: str) -> bool:
    return name not in sources(record, name)


def _replicas(record: Record, name: str, arrays: dict[str, Array], layer: int | None) -> list[Array]:
    """The dense parameter as each replica that is used has it."""
    mixture, dense = parameterwise.configs(record)
    declared, made = models.declarations(mixture), record["upcycle"]
    axes = models.declarations(dense)[name].axes
    if "mlp" not in axes:
        return [_output_bias(made, arrays, declared, replica) for replica in record["replicas"]]
    axis = axes.index("mlp")
    here = slice(None) if layer is None else slice(layer, layer + 1)
    (routed,) = (n for n in arrays if "expert_mlp" in declared[n].axes)
    shared = [_over(x, made["factors"][n]) for n, x in arrays.items() if n != routed]
    result = []
    for replica in record["replicas"]:
        joined = _join(arrays[routed], declared[routed].axes, replica, made["granularity"])
        joined = _over(joined, made["factors"][routed])
        whole = namespace(joined).concatenate([joined, *shared], axis=axis) if shared else joined
        place = _places(made, replica, here)
        result.append(whole if place is None else take(whole, place, axis, axes=axes))
    return result


def _output_bias(
    made: Record, arrays: dict[str, Array], declared: dict[str, models.Declaration], replica: int
) -> Array:
    """The bias on the output: the mean over a replica's experts without the factor, and what the shared expert has."""
    (routed,) = (n for n in arrays if declared[n].of_experts)
    experts, count = declared[routed].axes.index("experts"), made["granularity"]
    parts = [arrays[routed][(slice(None),) * experts + (replica * count + shard,)] for shard in range(count)]
    own = _over(_mean(parts), made["factors"][routed])
    for name in arrays:
        own = own if name == routed else own + _over(arrays[name], made["shared"]["scale"])
    return own


def _join(array: Array, axes: tuple[str, ...], replica: int, granularity: int) -> Array:
    """The G experts of one replica beside each other along the neurons, without the axis of experts."""
    xp, experts = namespace(array), axes.index("experts")
    start = replica * granularity
    array = array[(slice(None),) * experts + (slice(start, start + granularity),)]
    neurons = axes.index("expert_mlp") - 1  # where it is once the axis of experts is gone
    array = xp.moveaxis(array, experts, neurons)
    return array.reshape(*array.shape[:neurons], -1, *array.shape[neurons + 2 :])


def _places(made: Record, replica: int, here: slice) -> np.ndarray | None:
    """Where each dense neuron is among a replica's routed and then shared neurons, [L, F] or [F]; None if in order."""
    order_RLP, shared_LS = made["partition"]["order"], made["shared"]["neurons"]
    if order_RLP is None:
        return None
    order_LP = np.asarray(order_RLP[replica if len(order_RLP) > 1 else 0])
    order_LP = order_LP[here] if len(order_LP) > 1 else order_LP
    if shared_LS is not None:
        order_LP = np.concatenate([order_LP, np.asarray(shared_LS)[here]], axis=1)
    place_LF = np.argsort(order_LP, axis=1)
    return place_LF if len(place_LF) > 1 or shared_LS is not None else place_LF[0]


def _over(array: Array, factor: float) -> Array:
    """`array / factor`, rounded once to the dtype of `array`; a quotient, since a reciprocal would be rounded too."""
    if factor == 1.0:
        return array
    wide = np.promote_types(array.dtype, np.float32)
    if isinstance(array, np.ndarray):
        return (array.astype(wide) / np.asarray(factor, wide)).astype(array.dtype)
    # Behind a barrier and as large as the array, or XLA multiplies by the reciprocal of the one number that it is.
    divisor: Any = jax.lax.optimization_barrier(jnp.full_like(array, factor, dtype=wide))
    return (array.astype(wide) / divisor).astype(array.dtype)
