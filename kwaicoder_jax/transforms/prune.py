"""Structured pruning to exact shapes: layers, channels, MLP neurons, query heads and KV heads (Minitron, 2407.14679).

`plan` decides from scores alone; `replay` cuts; `apply` does both. Every parameter is cut along the axes it declares,
so no parameter is known here by name.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import parameterwise
from kwaicoder_jax.transforms.arrays import Array, scaled, take
from kwaicoder_jax.transforms.scores import Scores

Record = parameterwise.Record
_WHERE = "prune.target"


@dataclasses.dataclass(frozen=True)
class Target:
    """The sizes to prune to; None keeps the size."""

    layers: int | None = None
    model_dim: int | None = None
    mlp_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    def resolve(self, config: models.ModelConfig) -> "Target":
        """The target with every size filled in, checked against `config`; UserError names the field that cannot be."""
        sizes = {}
        for field in dataclasses.fields(self):
            asked, have = getattr(self, field.name), getattr(config, field.name)
            sizes[field.name] = have if asked is None else asked
            if not 1 <= sizes[field.name] <= have:
                raise UserError(
                    f"{asked} cannot be kept of {have}", where=f"{_WHERE}.{field.name}", remedy=f"use 1 to {have}"
                )
        heads, groups, per_group = sizes["heads"], sizes["kv_heads"], config.heads // config.kv_heads
        choices = ", ".join(str(groups * n) for n in range(1, per_group + 1))
        if heads % groups:
            raise UserError(
                f"{heads} query heads do not share {groups} KV heads evenly", where=f"{_WHERE}.heads",
                remedy=f"with {groups} KV heads use one of {choices}",
            )  # fmt: skip
        if heads // groups > per_group:
            raise UserError(
                f"{heads} query heads need {heads // groups} in each of {groups} KV groups, which hold {per_group}",
                where=f"{_WHERE}.heads", remedy=f"with {groups} KV heads use one of {choices}",
            )  # fmt: skip
        return Target(**sizes)


def apply(
    params: models.Params,
    config: models.ModelConfig,
    scores: Scores,
    target: Target,
    *,
    norm_correction: bool = True,
    protect_ends: bool = True,
) -> tuple[models.Params, models.ModelConfig, Record]:
    """Prunes to exactly `target`, keeping the units with the highest scores.

    Args:
      params: of a dense model; numpy, device or sharded arrays, and the result is of the same kind.
      config: the model.
      scores: from `importance.collect` on the same model.
      target: sizes.
      norm_correction: multiply each norm by sqrt(rho * D / D'), rho the kept share of the energy that enters it, so
        that the kept channels come out of the norm as large as they did before.
      protect_ends: never drop the first and the last layer.

    Returns:
      Student parameters, student config, and a JSON-able record:
        kept: original indices, ascending: "layers" [L'], "embed" [D'], and per kept layer "mlp" [L', F'],
          "heads" [L', H'], "kv_heads" [L', K'].
        norm_factors: parameter name to the factor of each kept layer [L'], or one number for the final norm.
        target, norm_correction, protect_ends: what was asked, sizes filled in.
        config_before, config_after, params_before, params_after.

    Raises:
      UserError: a target that cannot be, scores of another shape, a mixture.
    """
    record = plan(config, scores, target, norm_correction=norm_correction, protect_ends=protect_ends)
    student, student_config = replay(params, config, record)
    return student, student_config, record


def plan(
    config: models.ModelConfig,
    scores: Scores,
    target: Target,
    *,
    norm_correction: bool = True,
    protect_ends: bool = True,
) -> Record:
    """Decides what to keep, without touching a parameter; arguments, record and errors as in `apply`."""
    _check_scores(config, scores)
    sizes = target.resolve(config)
    layers_L = _keep_layers(scores.layers_L, sizes.layers or 0, protect_ends)
    channels_D = _best(scores.channels_D, sizes.model_dim or 0)
    heads_LH, groups_LK = _keep_heads(
        scores.heads_LH[layers_L], scores.groups_LK[layers_L], sizes.heads or 0, sizes.kv_heads or 0
    )
    kept = {
        "layers": layers_L,
        "embed": channels_D,
        "mlp": _best(scores.neurons_LF[layers_L], sizes.mlp_dim or 0),
        "heads": heads_LH,
        "kv_heads": groups_LK,
    }
    student_config = config.replace(**dataclasses.asdict(sizes))
    return {
        "kept": {axis: index.tolist() for axis, index in kept.items()},
        "norm_factors": _norm_factors(config, scores, layers_L, channels_D) if norm_correction else {},
        "target": dataclasses.asdict(sizes),
        "norm_correction": norm_correction,
        "protect_ends": protect_ends,
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
    array, axes = arrays[name], models.declarations(parameterwise.configs(record)[0])[name].axes
    kept = {axis: np.asarray(index) for axis, index in record["kept"].items()}
    factor = record["norm_factors"].get(name)
    if layer is not None and "layers" in axes:
        kept = {axis: index[layer : layer + 1] if index.ndim == 2 else index for axis, index in kept.items()}
        kept["layers"] = np.zeros(1, int)
        factor = None if factor is None else factor[layer : layer + 1]
    for axis in ("layers", *(axis for axis in axes if axis != "layers")):  # per-layer lists are of kept layers
        if axis in axes and axis in kept:
            array = take(array, kept[axis], axes.index(axis))
    if factor is None:
        return array
    return scaled(array, np.asarray(factor)[:, None] if "layers" in axes else float(factor))


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest along the last axis, ascending; among equals the lowest index wins."""
    return np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :count], axis=-1)


def _keep_layers(scores_L: np.ndarray, count: int, protect_ends: bool) -> np.ndarray:
    scores_L = np.array(scores_L, dtype=np.float64)
    if protect_ends and count < len(scores_L):
        if count < 2:
            raise UserError(
                f"{count} layer cannot hold both the first and the last", where=f"{_WHERE}.layers",
                remedy="use 2 or more, or prune.protect_ends=False",
            )  # fmt: skip
        scores_L[[0, -1]] = np.inf
    return _best(scores_L, count)


def _keep_heads(heads_LH: np.ndarray, groups_LK: np.ndarray, heads: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The best groups of each layer, and inside each the best heads, so that head h still reads group h // (H'/K')."""
    layers, have = groups_LK.shape
    per_group = heads_LH.shape[1] // have
    kept_LK = _best(groups_LK, groups)
    inside_LKG = np.take_along_axis(heads_LH.reshape(layers, have, per_group), kept_LK[:, :, None], axis=1)
    kept_LKG = _best(inside_LKG, heads // groups) + kept_LK[:, :, None] * per_group
    return kept_LKG.reshape(layers, heads), kept_LK


def _norm_factors(
    config: models.ModelConfig, scores: Scores, layers_L: np.ndarray, channels_D: np.ndarray
) -> dict[str, Any]:
    """sqrt(rho * D / D') per norm; the norms are the parameters whose only axis beside layers is the channels."""
    factors: dict[str, Any] = {}
    if len(channels_D) == config.model_dim:
        return factors
    for name, d in models.declarations(config).items():
        if tuple(axis for axis in d.axes if axis != "layers") != ("embed",):
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
    if config.experts is not None:
        raise UserError("pruning takes dense models", where="model.experts", remedy="prune before upcycling")
    sizes = {"L": config.layers, "D": config.model_dim, "F": config.mlp_dim, "H": config.heads, "K": config.kv_heads}
    for name, value in dataclasses.asdict(scores).items():
        if not isinstance(value, np.ndarray):
            continue
        shape = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        if value.shape != shape:
            raise UserError(f"{name} has shape {value.shape}, the model needs {shape}", where="prune.scores")
        if not np.all(np.isfinite(value)):
            raise UserError(f"{name} is not finite", where="prune.scores", remedy="calibrate on other data")
