"""AdamW as an optax chain; weight decay and per-matrix rates follow what the parameters declare."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with global-norm clipping."""

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{getattr(self, name)} is no decay rate",
                    where=f"optimizer.{name}",
                    remedy="use 0 or more, below 1",
                )
        if not self.weight_decay >= 0:
            raise UserError(f"{self.weight_decay} is negative", where="optimizer.weight_decay", remedy="use 0 or more")
        for name in ("epsilon", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"{getattr(self, name)} is not positive", where=f"optimizer.{name}", remedy="use more than 0"
                )


def decays(declaration: models.Declaration) -> bool:
    """Matrices decay; norm scales (one axis beside the layer axis) do not."""
    return len([axis for axis in declaration.axes if axis != "layers"]) > 1


def make_optimizer(
    config: OptimizerConfig,
    rate: Callable[[jax.Array], jax.Array],
    model: models.ModelConfig,
    multipliers: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a trainable tree {"model": params, **extras}.

    Args:
      config: constants.
      rate: learning rate as a function of the step.
      model: tells which parameters decay. Extras (projections) do not decay.
      multipliers: learning-rate factor by parameter name, as in {"layers/moe/up": 2.0}; 1 where not named. It scales
        the whole update, the weight decay with it, as a higher rate would.
    """
    multipliers = dict(multipliers or {})
    declared = models.declarations(model)
    if unknown := sorted(set(multipliers) - set(declared)):
        raise UserError(
            f"{unknown[0]!r} is not a parameter of the model", where="optimizer.multipliers",
            remedy=f"the parameters are {sorted(declared)}",
        )  # fmt: skip

    def decay_mask(trainable: Any) -> Any:
        mask = jax.tree.map(lambda _: False, trainable)
        mask["model"] = models.unflatten({name: decays(d) for name, d in declared.items()})
        return mask

    def scale_rates(updates: Any, _: Any = None) -> Any:
        flat = models.flatten(updates["model"])
        scaled = {name: update * multipliers.get(name, 1.0) for name, update in flat.items()}
        return {**updates, "model": models.unflatten(scaled)}

    steps = [
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate),
    ]
    if multipliers:
        steps.append(optax.stateless(scale_rates))
    return optax.chain(*steps)
