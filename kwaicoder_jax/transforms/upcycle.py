"""Dense to mixture of experts without a change of function: split by width, replicate, scale (granular upcycling).

y(x) = A * (sum of the combine weights of the chosen replicas) * F(x), so the mixture equals the dense model for every
input if and only if that sum is a constant c and A = 1/c (virtual groups: He et al. 2024, arXiv 2410.07524, section 3).
"""

import inspect
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import drop, exactness, merge, parameterwise, partition, router_init, split
from kwaicoder_jax.transforms.arrays import Array
from kwaicoder_jax.transforms.coactivation import CoActivation
from kwaicoder_jax.transforms.scores import Scores

Record = parameterwise.Record


def apply(
    params: models.Params, config: models.ModelConfig, **options: Any
) -> tuple[models.Params, models.ModelConfig, Record]:
    """Turns every MLP into R*G experts of F/G neurons, of which a token uses k*G.

    Args:
      params: of a dense model; numpy, device or sharded arrays, traced ones too, and the result is of the same kind.
        Parameters that the mixture shares with the dense model are passed on, not copied.
      config: the dense model.
      **options: the keyword arguments of `plan`; granularity and replicas have to be given.

    Returns:
      Mixture parameters, mixture config, and the record of `plan`.

    Raises:
      UserError: as `plan`; dropped neurons under jit.
    """
    for name in set(options) - set(OPTIONS):
        raise UserError("no such field", where=f"upcycle.{name}", remedy=f"the fields are {list(OPTIONS)}")
    record = plan(config, **options)
    moe, moe_config = replay(params, config, record)
    return moe, moe_config, record


def plan(
    config: models.ModelConfig,
    *,
    granularity: int,
    replicas: int,
    top_replicas: int = 1,
    experts_per_token: int | None = None,
    router: str = models.Router.TOPK_SOFTMAX,
    routed_scale: float = 1.0,
    router_bias: bool = False,
    router_init: str = router_init.RouterInit.NORMAL,
    router_std: float | None = None,
    mlp_inputs: np.ndarray | None = None,
    scale_placement: str = merge.ScalePlacement.BALANCED,
    partition: str = partition.Partition.CONTIGUOUS,
    scores: Scores | None = None,
    coactivation: CoActivation | None = None,
    shared_neurons: int = 0,
    shared_gate: bool = False,
    shared_scale: float | None = None,
    drop_ratio: float = 0.0,
    drop_replicas: int | Sequence[int] | None = None,
    allow_lossy: bool = False,
    seed: int = 0,
) -> Record:
    """Decides everything, without touching a parameter.

    Args:
      config: the dense model.
      granularity: G, shards of each MLP.
      replicas: R, copies of each shard.
      top_replicas: k, replicas that a token uses.
      experts_per_token: T, instead of k*G; lossy unless a multiple of G.
      router: a value of `models.Router`.
      routed_scale: of the sigmoid router.
      router_bias: give the sigmoid router a selection bias per expert, zero at first.
      router_init: a value of `router_init.RouterInit`.
      router_std: standard deviation of the router's entries; default `config.initializer_range`.
      mlp_inputs: from `router_init.mlp_inputs`, for router_init "centroids".
      scale_placement: a value of `merge.ScalePlacement`.
      partition: a value of `partition.Partition`, or R of them separated by commas.
      scores: importance of the neurons, for a balanced partition and for shared neurons.
      coactivation: from `coactivation.collect`, for partition "coactivation".
      shared_neurons: S, most important neurons of each layer that form an always-on expert; G divides F - S.
      shared_gate: gate that expert by the sigmoid of a linear map, zero at first.
      shared_scale: factor on that expert; default 2 behind a gate (sigmoid(0) = 1/2), else 1.
      drop_ratio: share of the neurons of each expert that are drawn anew; lossy.
      drop_replicas: which replicas that concerns, or how many, counted from the last; default all.
      allow_lossy: accept a mixture that is not the dense model's function.
      seed: of the router rows, random partitions, clusters and drawn neurons.

    Returns:
      A JSON-able record, from which `replay`, `parameter` and `fold` work:
        granularity, replicas, top_replicas, experts_per_token, router, routed_scale, router_bias, seed, as used;
        lossless: whether the function is unchanged; lossy_because: why not, one line each;
        router_init, router_std, router_rows: [L][R][D] of centroids, else null;
        scale: A; scale_placement; factors: parameter name to the factor on it (for learning-rate multipliers);
        partition: "method" and "order", indices of routed neurons [R or 1][L or 1][F - S], or null for all in order;
        shared: "neurons" [L][S] or null, "gate", "scale";
        drop: "ratio", "replicas", "neurons_per_expert";
        expert_order: "replica_major", e = r*G + g;
        config_before, config_after, params_before, params_total, params_active.

    Raises:
      UserError: names the field: G does not divide F, k above R, a lossy choice without `allow_lossy`, missing
        statistics, a mixture.
    """
    if config.experts is not None:
        raise UserError("the model is a mixture already", where="upcycle", remedy="upcycle a dense model")
    chosen = exactness.parse_router(router, routed_scale, router_bias)
    if not shared_neurons or granularity < 1:
        split.check_granularity(granularity, config.mlp_dim)
    used = exactness.experts_per_token(granularity, replicas, top_replicas, experts_per_token)
    neurons_LF = None
    if scores is not None:
        if scores.neurons_LF is None:
            raise UserError("the scores are of a mixture", where="upcycle.scores", remedy="score the dense model")
        neurons_LF = _check_neurons(scores.neurons_LF, config, "scores")
    if coactivation is not None:
        _check_neurons(coactivation.fires_LF, config, "coactivation")
    shared_LS, order_RLP = _neurons(
        config, partition, granularity, replicas, seed, neurons_LF, coactivation, shared_neurons
    )
    if shared_gate and shared_LS is None:
        raise UserError("there is no shared expert to gate", where="upcycle.shared_gate", remedy="set shared_neurons")
    if shared_scale is None or shared_LS is None:
        shared_scale = 2.0 if shared_gate else 1.0
    if not (math.isfinite(shared_scale) and shared_scale > 0):
        raise UserError(f"{shared_scale} is no factor", where="upcycle.shared_scale", remedy="use more than 0")
    if router_std is not None and not (math.isfinite(router_std) and router_std >= 0):
        raise UserError(f"{router_std} is no spread", where="upcycle.router_std", remedy="use 0 or more")
    factor = merge.scale(
        chosen, granularity=granularity, replicas=replicas, experts_per_token=used, routed_scale=routed_scale
    )
    width = (config.mlp_dim - shared_neurons) // granularity
    dropped = drop.plan(drop_ratio, drop_replicas, replicas=replicas, width=width)
    placed = (merge.placed(scale_placement, factor), merge.placed(scale_placement, shared_scale))
    lossy = exactness.losses(
        router=chosen, granularity=granularity, replicas=replicas, experts_per_token=used, placement=scale_placement,
        scale=factor, shared_gate=shared_gate, shared_scale=shared_scale,
        dropped=dropped["neurons_per_expert"] * granularity * len(dropped["replicas"]),
    )  # fmt: skip
    if lossy and not allow_lossy:
        raise lossy[0]
    moe_config = config.replace(
        experts=models.ExpertsConfig(
            replicas * granularity,
            used,
            width,
            chosen,
            routed_scale,
            router_bias,
            shared_neurons,
            shared_gate,
            bias=config.mlp_bias,
        )
    )
    std = config.initializer_range if router_std is None else router_std
    return {
        "granularity": granularity,
        "replicas": replicas,
        "top_replicas": top_replicas if used % granularity else used // granularity,
        "experts_per_token": used,
        "router": str(chosen),
        "routed_scale": routed_scale,
        "router_bias": router_bias,
        "router_std": std,
        **_router_rows(router_init, config, replicas, mlp_inputs, std, seed),
        "seed": seed,
        "lossless": not lossy,
        "lossy_because": [error.what for error in lossy],
        "scale": factor,
        "scale_placement": str(scale_placement),
        "factors": _factors(moe_config, *placed, bias=factor / granularity),
        "partition": {"method": str(partition), "order": _list(order_RLP)},
        "shared": {"neurons": _list(shared_LS), "gate": shared_gate, "scale": shared_scale},
        "drop": dropped,
        "expert_order": "replica_major",
        "config_before": config.to_dict(),
        "config_after": moe_config.to_dict(),
        "params_before": models.count(config),
        "params_total": models.count(moe_config),
        "params_active": models.count_active(moe_config),
    }


OPTIONS = tuple(name for name in inspect.signature(plan).parameters if name != "config")


def replay(
    params: models.Params, config: models.ModelConfig, record: Record
) -> tuple[models.Params, models.ModelConfig]:
    """Merges `params` as `record` says, also one read back from JSON; can be traced, unless neurons are dropped."""
    moe = parameterwise.replay(sys.modules[__name__], params, config, record)
    return moe, parameterwise.configs(record)[1]


def sources(record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
    """See `parameterwise.Transform`."""
    dense, _ = parameterwise.configs(record)
    declared = models.declarations(dense)
    if name in declared:
        return {name: layer if "layers" in declared[name].axes else None}
    if name in record["factors"]:
        return {dense_name(declared, name): layer}
    return {}


def parameter(record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
    """See `parameterwise.Transform`: passed on, merged from its dense namesake, or new (router, bias, shared gate)."""
    dense, moe = parameterwise.configs(record)
    if name in arrays:
        return arrays[name]
    d, here = models.declarations(moe)[name], slice(None) if layer is None else slice(layer, layer + 1)
    if not arrays:
        return _new(record, name, d, here)
    ((source, array),) = arrays.items()
    axes, factor = models.declarations(dense)[source].axes, record["factors"][name]
    if "shared_mlp" in d.axes:
        return merge.shared(array, axes, np.asarray(record["shared"]["neurons"])[here], factor)
    if "expert_mlp" not in d.axes:
        return merge.copies(array, record["granularity"] * record["replicas"], d.axes.index("experts"), factor)
    order_RLP = record["partition"]["order"]
    if order_RLP is not None:
        order_RLP = np.asarray([lists[here] if len(lists) > 1 else lists for lists in order_RLP])  # cut, then parsed
    merged = merge.experts(
        array, axes, d.axes, granularity=record["granularity"], replicas=record["replicas"], order_RLF=order_RLP,
        factor=factor,
    )  # fmt: skip
    return drop.redraw(
        merged, d.axes, name=name, drop=record["drop"], granularity=record["granularity"], seed=record["seed"],
        layer=layer or 0,
    )  # fmt: skip


def _new(record: Record, name: str, d: models.Declaration, here: slice) -> np.ndarray:
    """A parameter that the dense model has no part in, some layers of it: router columns, or zeros."""
    if "embed" not in d.axes or d.axes[-1] != "experts":
        return np.zeros((len(range(*here.indices(d.shape[0]))), *d.shape[1:]), np.float32)
    rows = record["router_rows"]
    return router_init.columns(
        record["router_init"], d.shape, d.axes, granularity=record["granularity"], std=record["router_std"],
        seed=record["seed"], rows_LRD=None if rows is None else np.asarray(rows[here], np.float32), layers=here,
    )  # fmt: skip


def dense_name(declared: dict[str, models.Declaration], name: str) -> str:
    """The dense parameter that an expert's is made of: the MLP's of the same last name."""
    (source,) = (n for n in declared if n.split("/")[-2:] == ["mlp", name.rsplit("/", 1)[1]])
    return source


def _factors(
    moe_config: models.ModelConfig, routed: dict[str, float], shared: dict[str, float], *, bias: float
) -> dict[str, float]:
    """The factor on each expert parameter, by name: a bias on the neurons follows its matrix.

    The bias on the output is in every expert: over the T chosen ones its weights sum to G/A, so each has A/G of it, and
    the shared expert none.
    """
    factors = {}
    for name, d in models.declarations(moe_config).items():
        if "expert_mlp" in d.axes or "shared_mlp" in d.axes:
            factors[name] = (routed if "expert_mlp" in d.axes else shared)[name.rsplit("/", 1)[1].removesuffix("_bias")]
        elif d.of_experts:
            factors[name] = bias
    return factors


def _neurons(
    config: models.ModelConfig, method: str, granularity: int, replicas: int, seed: int,
    neurons_LF: np.ndarray | None, coactivation: CoActivation | None, shared: int,
) -> tuple[np.ndarray | None, np.ndarray | None]:  # fmt: skip
    """Neurons of the shared expert [L, S], and the order of the routed ones [R or 1, L or 1, F - S]."""
    shared_LS = partition.shared_neurons(shared, mlp_dim=config.mlp_dim, granularity=granularity, neurons_LF=neurons_LF)
    return shared_LS, partition.partition(
        method, mlp_dim=config.mlp_dim, granularity=granularity, replicas=replicas, seed=seed, neurons_LF=neurons_LF,
        coactivation=coactivation, shared_LS=shared_LS,
    )  # fmt: skip


def _router_rows(
    method: str, config: models.ModelConfig, replicas: int, mlp_inputs: np.ndarray | None, std: float, seed: int
) -> Record:
    """The record's part on where router rows come from."""
    chosen = router_init.parse(method, config, replicas, mlp_inputs)
    rows_LRD = None
    if chosen is router_init.RouterInit.CENTROIDS:
        assert mlp_inputs is not None
        rows_LRD = router_init.centroid_rows(mlp_inputs, replicas, std=std, seed=seed)
    return {"router_init": str(chosen), "router_rows": _list(rows_LRD)}


def _check_neurons(array_LF: np.ndarray, config: models.ModelConfig, what: str) -> np.ndarray:
    if array_LF.shape != (config.layers, config.mlp_dim):
        raise UserError(f"the {what} are of a model of another shape", where=f"upcycle.{what}")
    return array_LF


def _list(array: np.ndarray | None) -> Any:
    return None if array is None else array.tolist()
