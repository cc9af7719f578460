"""Dense to mixture of experts without a change of function: split by width, replicate, scale (granular upcycling).

y(x) = A * (sum of the combine weights of the chosen replicas) * F(x), so the mixture equals the dense model for every
input if and only if that sum is a constant c and A = 1/c (virtual groups: He et al. 2024, arXiv 2410.07524, section 3).
"""

import sys

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import merge, parameterwise, split
from kwaicoder_jax.transforms.arrays import Array
from kwaicoder_jax.transforms.scores import Scores

Record = parameterwise.Record


def apply(
    params: models.Params,
    config: models.ModelConfig,
    *,
    granularity: int,
    replicas: int,
    top_replicas: int = 1,
    experts_per_token: int | None = None,
    router: str = models.Router.TOPK_SOFTMAX,
    routed_scale: float = 1.0,
    router_std: float | None = None,
    scale_placement: str = merge.ScalePlacement.BALANCED,
    partition: str = split.Partition.CONTIGUOUS,
    scores: Scores | None = None,
    allow_lossy: bool = False,
    seed: int = 0,
) -> tuple[models.Params, models.ModelConfig, Record]:
    """Turns every MLP into R*G experts of F/G neurons, of which a token uses k*G.

    Args:
      params: of a dense model; numpy, device or sharded arrays, traced ones too, and the result is of the same kind.
        Parameters that the mixture shares with the dense model are passed on, not copied.
      config: the dense model.
      granularity: G, shards of each MLP.
      replicas: R, copies of each shard.
      top_replicas: k, replicas that a token uses.
      experts_per_token: T, instead of k*G; lossy unless a multiple of G.
      router: a value of `models.Router`.
      routed_scale: of the sigmoid router.
      router_std: standard deviation of the router's entries; default `config.initializer_range`.
      scale_placement: a value of `merge.ScalePlacement`.
      partition: a value of `split.Partition`.
      scores: importance of the neurons, for a balanced partition.
      allow_lossy: accept a mixture that is not the dense model's function.
      seed: of the router rows and of random partitions.

    Returns:
      Mixture parameters, mixture config, and a JSON-able record:
        granularity, replicas, top_replicas, experts_per_token, router, routed_scale, router_std, seed, as used;
        lossless: whether the function is unchanged;
        scale: A; scale_placement; factors: parameter name to the factor on it (for learning-rate multipliers);
        partition: "method" and "order", neuron indices [R or 1][L or 1][F], or null for the order as it was;
        expert_order: "replica_major", e = r*G + g;
        config_before, config_after, params_before, params_total, params_active.

    Raises:
      UserError: names the field: G does not divide F, k above R, a lossy choice without `allow_lossy`, a mixture.
    """
    if config.experts is not None:
        raise UserError("the model is a mixture already", where="upcycle", remedy="upcycle a dense model")
    models.check(params, config)
    chosen = _parse_router(router, routed_scale)
    split.check_granularity(granularity, config.mlp_dim)
    used = _experts_per_token(granularity, replicas, top_replicas, experts_per_token, allow_lossy)
    lossless = _check_exact(chosen, granularity, replicas, used, allow_lossy)
    order_RLF = split.partition(
        partition, mlp_dim=config.mlp_dim, granularity=granularity, replicas=replicas, seed=seed,
        neurons_LF=None if scores is None else scores.neurons_LF,
    )  # fmt: skip
    if order_RLF is not None and order_RLF.shape[1:] not in ((1, config.mlp_dim), (config.layers, config.mlp_dim)):
        raise UserError("the scores are of a model of another shape", where="upcycle.scores")
    factor = merge.scale(
        chosen, granularity=granularity, replicas=replicas, experts_per_token=used, routed_scale=routed_scale
    )
    experts = models.ExpertsConfig(replicas * granularity, used, config.mlp_dim // granularity, chosen, routed_scale)
    moe_config = config.replace(experts=experts)
    std = config.initializer_range if router_std is None else router_std
    record = {
        "granularity": granularity,
        "replicas": replicas,
        "top_replicas": top_replicas,
        "experts_per_token": used,
        "router": str(chosen),
        "routed_scale": routed_scale,
        "router_std": std,
        "seed": seed,
        "lossless": lossless,
        "scale": factor,
        "scale_placement": str(scale_placement),
        "factors": _factors(moe_config, merge.placed(scale_placement, factor)),
        "partition": {"method": str(partition), "order": None if order_RLF is None else order_RLF.tolist()},
        "expert_order": "replica_major",
        "config_before": config.to_dict(),
        "config_after": moe_config.to_dict(),
        "params_before": models.count(config),
        "params_total": models.count(moe_config),
        "params_active": models.count_active(moe_config),
    }
    moe, moe_config = replay(params, config, record)
    return moe, moe_config, record


def replay(
    params: models.Params, config: models.ModelConfig, record: Record
) -> tuple[models.Params, models.ModelConfig]:
    """Merges `params` as `record` says, also one read back from JSON; can be traced."""
    moe = parameterwise.replay(sys.modules[__name__], params, config, record)
    return moe, parameterwise.configs(record)[1]


def sources(record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
    """See `parameterwise.Transform`."""
    dense, moe = parameterwise.configs(record)
    declared = models.declarations(dense)
    if name in declared:
        return {name: layer if "layers" in declared[name].axes else None}
    if "expert_mlp" in models.declarations(moe)[name].axes:
        return {_dense_name(declared, name): layer}
    return {}


def parameter(record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
    """See `parameterwise.Transform`: passed on, merged from its dense namesake, or a new router."""
    dense, moe = parameterwise.configs(record)
    if name in arrays:
        return arrays[name]
    d, here = models.declarations(moe)[name], slice(None) if layer is None else slice(layer, layer + 1)
    if not arrays:
        std, seed = record["router_std"], record["seed"]
        return merge.router(d.shape, d.axes, granularity=record["granularity"], std=std, seed=seed)[here]
    ((source, array),) = arrays.items()
    order_RLF = record["partition"]["order"]
    if order_RLF is not None:
        order_RLF = np.asarray(order_RLF)
        order_RLF = order_RLF[:, here] if order_RLF.shape[1] > 1 else order_RLF
    return merge.experts(
        array, models.declarations(dense)[source].axes, d.axes, granularity=record["granularity"],
        replicas=record["replicas"], order_RLF=order_RLF, factor=record["factors"][name],
    )  # fmt: skip


def _dense_name(declared: dict[str, models.Declaration], name: str) -> str:
    """The dense matrix that an expert matrix is made of: the one of the same last name."""
    matrix = name.rsplit("/", 1)[1]
    (source,) = (n for n, d in declared.items() if "mlp" in d.axes and n.endswith("/" + matrix))
    return source


def _factors(moe_config: models.ModelConfig, placed: dict[str, float]) -> dict[str, float]:
    """The factor on each expert matrix, by parameter."""
    declared = models.declarations(moe_config)
    return {name: placed[name.rsplit("/", 1)[1]] for name, d in declared.items() if "expert_mlp" in d.axes}


def _parse_router(router: str, routed_scale: float) -> models.Router:
    try:
        chosen = models.Router(router)
    except ValueError as error:
        choices = ", ".join(models.Router)
        raise UserError(f"no router {router!r}", where="upcycle.router", remedy=f"use {choices}") from error
    if routed_scale <= 0 or (routed_scale != 1.0 and chosen is not models.Router.SIGMOID):
        raise UserError(
            f"{routed_scale} does not go with router {chosen}", where="upcycle.routed_scale",
            remedy="it is positive, and 1 except for sigmoid",
        )  # fmt: skip
    return chosen


def _experts_per_token(
    granularity: int, replicas: int, top_replicas: int, experts_per_token: int | None, allow_lossy: bool
) -> int:
    """T, checked."""
    if replicas < 1:
        raise UserError(f"{replicas} replicas", where="upcycle.replicas", remedy="use 1 or more")
    if not 1 <= top_replicas <= replicas:
        raise UserError(
            f"{top_replicas} of {replicas} replicas", where="upcycle.top_replicas", remedy=f"use 1 to {replicas}"
        )
    used = top_replicas * granularity if experts_per_token is None else experts_per_token
    if not 1 <= used <= replicas * granularity:
        raise UserError(
            f"{used} of {replicas * granularity} experts", where="upcycle.experts_per_token",
            remedy=f"use 1 to {replicas * granularity}",
        )  # fmt: skip
    if used % granularity and not allow_lossy:
        raise UserError(
            f"{used} is not a multiple of granularity {granularity}, so the function would change",
            where="upcycle.experts_per_token",
            remedy=f"use a multiple of {granularity}, or upcycle.allow_lossy=True",
        )
    return used


def _check_exact(
    router: models.Router, granularity: int, replicas: int, experts_per_token: int, allow_lossy: bool
) -> bool:
    """Whether the combine weights of whole replicas sum to a constant; UserError if not and that is not allowed."""
    constant = router is not models.Router.SOFTMAX_TOPK or experts_per_token == replicas * granularity
    if not constant and not allow_lossy:
        raise UserError(
            f"{router} does not renormalise, so its weights sum to another number for every token",
            where="upcycle.router", remedy="use topk_softmax or sigmoid, or upcycle.allow_lossy=True",
        )  # fmt: skip
    return constant and experts_per_token % granularity == 0
