"""Structured pruning to exact shapes: layers, channels, MLP neurons, query heads and KV heads (Minitron, 2407.14679).

Of a mixture also experts, their neurons, and those of the shared expert. `plan` decides from scores alone; `replay`
cuts; `apply` does both. Every parameter is cut along the axes it declares, so no parameter is known here by name.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import depth, heads, parameterwise
from kwaicoder_jax.transforms.arrays import Array, scaled, take
from kwaicoder_jax.transforms.depth import LayerScores
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target, axes, present

Record = parameterwise.Record
_NESTED = ("layers", "experts")  # cut first and in this order: what lies inside has a list for each that is kept


def apply(
    params: models.Params,
    config: models.ModelConfig,
    scores: Scores,
    target: Target,
    *,
    norm_correction: bool = True,
    protect_ends: bool = True,
    layer_scores: str = LayerScores.INFLUENCE,
    head_merge: bool = False,
) -> tuple[models.Params, models.ModelConfig, Record]:
    """Prunes to exactly `target`, keeping the units with the highest scores.

    Removing experts: the router's columns and its bias follow the experts. It changes the function for tokens that
    chose a removed one, and for every token under a softmax that is not renormalised. An upcycled mixture (see
    `upcycle`) equals its dense model because the G shards of a replica are always chosen together: that stays true
    only if whole replicas go and `experts_per_token` stays k*G; scores pick single experts, so removal breaks virtual
    groups in general, and by another choice in each layer. Prune before upcycling where losslessness matters, or train
    the mixture on afterwards.

    Args:
      params: numpy, device or sharded arrays, and the result is of the same kind.
      config: the model, dense or a mixture.
      scores: from `importance.collect` on the same model.
      target: sizes.
      norm_correction: multiply each norm by sqrt(rho * D / D'), rho the kept share of the energy that enters it, so
        that the kept channels come out of the norm as large as they did before.
      protect_ends: never drop the first and the last layer.
      layer_scores: what layers are ranked by, a value of `depth.LayerScores`.
      head_merge: add to kept query heads what they have beyond the dropped ones, see `heads`.

    Returns:
      Student parameters, student config, and a JSON-able record:
        kept: original indices, ascending: "layers" [L'], "embed" [D'], and per kept layer "heads" [L', H'],
          "kv_heads" [L', K'] and "mlp" [L', F']; of a mixture, where they are cut, "experts" [L', E'], per kept expert
          "expert_mlp" [L', E', F'], and "shared_mlp" [L', S'].
        merged_heads: [L', H'] original index of the head merged into each kept one, -1 for none; [] without merging.
        norm_factors: parameter name to the factor of each kept layer [L'], or one number for the final norm.
        target, norm_correction, protect_ends, layer_scores, head_merge: what was asked, sizes filled in.
        config_before, config_after, params_before, params_after.

    Raises:
      UserError: a target that cannot be, scores of another shape or without what the target needs.
    """
    options = {"norm_correction": norm_correction, "protect_ends": protect_ends, "layer_scores": layer_scores}
    record = plan(config, scores, target, head_merge=head_merge, **options)  # type: ignore[arg-type]
    student, student_config = replay(params, config, record)
    return student, student_config, record


def plan(
    config: models.ModelConfig,
    scores: Scores,
    target: Target,
    *,
    norm_correction: bool = True,
    protect_ends: bool = True,
    layer_scores: str = LayerScores.INFLUENCE,
    head_merge: bool = False,
) -> Record:
    """Decides what to keep, without touching a parameter; arguments, record and errors as in `apply`."""
    _check_scores(config, scores)
    sizes = target.resolve(config)
    assert sizes.layers is not None
    layers_L = depth.keep(scores, sizes.layers, layer_scores, protect_ends)
    student_config = target.apply(config, layers_L.tolist())
    channels_D = heads.best(scores.channels_D, student_config.model_dim)
    to_heads, to_groups, heads_LH = student_config.heads, student_config.kv_heads, scores.heads_LH[layers_L]
    kept_LH, kept_LK = heads.keep(heads_LH, scores.groups_LK[layers_L], to_heads, to_groups)
    kept = {"layers": layers_L, "embed": channels_D, "heads": kept_LH, "kv_heads": kept_LK}
    kept |= _keep_neurons(config, scores, sizes, layers_L)
    merging = head_merge and to_heads // to_groups < config.heads // config.kv_heads
    if merging:
        heads.check_linear(config)
    merged = heads.partners(heads_LH, kept_LK, to_heads, config.kv_heads).tolist() if merging else []
    return {
        "kept": {axis: index.tolist() for axis, index in kept.items()},
        "merged_heads": merged,
        "norm_factors": _norm_factors(config, scores, layers_L, channels_D) if norm_correction else {},
        "target": dataclasses.asdict(sizes),
        "norm_correction": norm_correction,
        "protect_ends": protect_ends,
        "layer_scores": str(layer_scores),
        "head_merge": head_merge,
        "config_before": config.to_dict(),
        "config_after": student_config.to_dict(),
        "params_before": models.count(config),
        "params_after": models.count(student_config),
    }


def replay(
    params: models.Params, config: models.ModelConfig, record: Record
) -> tuple[models.Params, models.ModelConfig]:
    """Cuts `params` as `record` says, also one read back from JSON; can be traced."""
    student = parameterwise.replay(sys.modules[__name__], params, config, record)
    return student, parameterwise.configs(record)[1]


def sources(record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
    """See `parameterwise.Transform`."""
    if layer is None or not name.startswith("layers/"):
        return {name: None}
    return {name: record["kept"]["layers"][layer]}


def parameter(record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
    """See `parameterwise.Transform`."""
    array, names = arrays[name], models.declarations(parameterwise.configs(record)[0])[name].axes
    here = slice(None) if layer is None else slice(layer, layer + 1)
    for axis in (*_NESTED, *(axis for axis in names if axis not in _NESTED)):
        if axis not in names or axis not in record["kept"] or (axis == "layers" and layer is not None):
            continue
        index, place = np.asarray(record["kept"][axis]), names.index(axis)
        index = index[here] if index.ndim > 1 else index
        if axis == "heads" and names[-1] != "embed" and record.get("merged_heads"):  # the projection into the heads
            array = heads.merge(array, index, np.asarray(record["merged_heads"])[here], names)
        else:
            lists = tuple(names.index(outer) for outer in _NESTED[: index.ndim - 1])
            array = take(array, index, place, lists, axes=names)
    factor = record["norm_factors"].get(name)
    if factor is None:
        return array
    return scaled(array, np.asarray(factor)[here, None] if "layers" in names else float(factor))


def _keep_neurons(
    config: models.ModelConfig, scores: Scores, sizes: Target, layers_L: np.ndarray
) -> dict[str, np.ndarray]:
    """Neurons of the dense MLP; or experts and the neurons of those that are kept, where they are cut."""
    before, after = axes(present(config)), axes(dataclasses.asdict(sizes))
    cut = {axis for axis in before if after[axis] < before[axis]}
    kept = {}
    if "mlp" in before:
        every_LF = np.zeros((config.layers, config.mlp_dim))  # equal scores: all of them, in their order
        neurons_LF = _needed(scores, "neurons_LF", "mlp_dim") if "mlp" in cut else every_LF
        kept["mlp"] = heads.best(neurons_LF[layers_L], after["mlp"])
    if "experts" in cut:
        kept["experts"] = heads.best(_needed(scores, "experts_LE", "experts")[layers_L], after["experts"])
    if "expert_mlp" in cut:
        neurons_LEF = _needed(scores, "expert_neurons_LEF", "expert_dim")[layers_L]
        if "experts" in kept:
            neurons_LEF = np.take_along_axis(neurons_LEF, kept["experts"][:, :, None], axis=1)
        kept["expert_mlp"] = heads.best(neurons_LEF, after["expert_mlp"])
    if "shared_mlp" in cut:
        kept["shared_mlp"] = heads.best(
            _needed(scores, "shared_neurons_LS", "shared_dim")[layers_L], after["shared_mlp"]
        )
    return kept


def _needed(scores: Scores, name: str, field: str) -> np.ndarray:
    value = getattr(scores, name)
    if value is None:
        raise UserError(
            f"the scores have no {name}", where=f"prune.target.{field}", remedy="collect scores of this model"
        )
    return value


def _norm_factors(
    config: models.ModelConfig, scores: Scores, layers_L: np.ndarray, channels_D: np.ndarray
) -> dict[str, Any]:
    """sqrt(rho * D / D') per norm of the channels."""
    factors: dict[str, Any] = {}
    if len(channels_D) == config.model_dim:
        return factors
    for name, d in models.declarations(config).items():
        if d.kind != "scale" or d.inner_axes != ("embed",):
            continue
        stacked = "layers" in d.axes
        share = getattr(scores, f"{name.split('/')[-2]}_{'LD' if stacked else 'D'}")
        share = share[layers_L] if stacked else share
        total, kept = np.sum(share, axis=-1), np.sum(share[..., channels_D], axis=-1)
        silent = total == 0  # nothing ever entered this norm, so nothing is known: leave it alone
        rho = np.where(silent, len(channels_D) / config.model_dim, kept / np.where(silent, 1.0, total))
        factors[name] = np.sqrt(rho * config.model_dim / len(channels_D)).tolist()
    return factors


def _check_scores(config: models.ModelConfig, scores: Scores) -> None:
    if not isinstance(scores, Scores):
        remedy = "give what importance.collect returned, or Scores.load(FILE)"
        raise UserError(f"{scores!r} are no scores", where="prune.scores", remedy=remedy)
    sizes = {"L": config.layers, "D": config.model_dim, "F": config.mlp_dim, "H": config.heads, "K": config.kv_heads}
    if config.experts is not None:
        e = config.experts
        sizes |= {"E": e.num_experts, "F": e.mlp_dim, "S": e.shared_mlp_dim}
    for field in dataclasses.fields(scores):
        value = getattr(scores, field.name)
        if not isinstance(value, np.ndarray):
            continue
        letters = field.name.rsplit("_", 1)[1]
        shape = tuple(sizes.get(letter, 0) for letter in letters)
        if value.shape != shape:
            raise UserError(f"{field.name} has shape {value.shape}, the model needs {shape}", where="prune.scores")
        value = value[np.triu_indices(len(value))] if letters == "LL" else value  # the rest means nothing
        if not np.all(np.isfinite(value)):
            raise UserError(f"{field.name} is not finite", where="prune.scores", remedy="calibrate on other data")
