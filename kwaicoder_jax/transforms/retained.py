"""How much importance a shape keeps: what candidates are chosen by before anything is measured."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.transforms import depth, heads
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target, present

SCORES = {"mlp_dim": "neurons_LF", "experts": "experts_LE", "expert_dim": "expert_neurons_LEF",
          "shared_dim": "shared_neurons_LS"}  # fmt: skip  # which scores a size is cut by


def kept_share(
    config: models.ModelConfig, scores: Scores, protect_ends: bool, layer_scores: str
) -> Callable[[Target], float]:
    """A function from a target to the logarithm of the share of importance that it keeps: the search's cheap proxy.

    The product over axes of: the kept layers' share of block influence; the kept share of squared scores, summed over
    layers, of channels, neurons, heads, and of experts and their neurons. Cost says nothing here: a shape is measured
    for what it keeps, not for how much of the budget it fills.
    """
    layers = config.layers

    def of_layers(count: int) -> float:
        kept_L = depth.keep(scores, count, layer_scores, protect_ends)
        influence_L = np.maximum(scores.layers_L, 0)
        return _ratio(influence_L[kept_L].sum(), influence_L.sum())

    def of_heads(pair: tuple[int, int]) -> float:
        kept_LH, _ = heads.keep(scores.heads_LH, scores.groups_LK, *pair)
        square_LH = np.square(scores.heads_LH)
        return _ratio(np.take_along_axis(square_LH, kept_LH, 1).sum(), square_LH.sum())

    def of_units(name: str) -> Callable[[int], float]:
        values = getattr(scores, SCORES.get(name, "channels_D"))
        square = None if values is None else -np.sort(-np.square(values), axis=-1)
        return lambda count: 1.0 if square is None else _ratio(square[..., :count].sum(), square.sum())

    units: dict[str, Callable[[Any], float]] = {
        name: of_units(name) for name in present(config) if name in (*SCORES, "model_dim")
    }
    units |= {"layers": of_layers, "heads": of_heads}
    known: dict[tuple[str, Any], float] = {}

    def share(target: Target) -> float:
        total = 0.0
        for name, measure in units.items():
            size = (target.heads, target.kv_heads) if name == "heads" else getattr(target, name)
            if (name, size) not in known:
                known[name, size] = math.log(max(measure(size), 1e-12)) if (name, size) != ("layers", layers) else 0.0
            total += known[name, size]
        return total

    return share


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 1.0
