"""AdamW as an optax chain; weight decay and per-matrix rates follow what the parameters declare."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
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
    """Matrices decay; norm scales and biases do not."""
    return declaration.kind == "matrix"


def make_optimizer(
    config: OptimizerConfig,
    rate: Callable[[jax.Array], jax.Array],
    model: models.ModelConfig,
    multipliers: Mapping[str, float] | None = None,
    epsilons: Mapping[str, float] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a trainable tree {"model": params, **extras}.

    Args:
      config: constants.
      rate: learning rate as a function of the step.
      model: tells which parameters decay. Extras (projections) do not decay.
      multipliers: learning-rate factor by parameter name, as in {"layers/moe/up": 2.0}; 1 where not named. It scales
        the whole update, the weight decay with it, as a higher rate would.
      epsilons: factor on Adam's epsilon by parameter name; 1 where not named. A matrix whose gradients became c times
        as large, as an upcycled one's do, moves as before with c * epsilon.
    """
    multipliers, epsilons = dict(multipliers or {}), dict(epsilons or {})
    declared = models.declarations(model)
    for field, names in (("multipliers", multipliers), ("epsilons", epsilons)):
        if unknown := sorted(set(names) - set(declared)):
            raise UserError(
                f"{unknown[0]!r} is not a parameter of the model", where=f"optimizer.{field}",
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
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)
        if not epsilons
        else _scale_by_adam(config, epsilons),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(rate),
    ]
    if multipliers:
        steps.append(optax.stateless(scale_rates))
    return optax.chain(*steps)


def _scale_by_adam(config: OptimizerConfig, epsilons: Mapping[str, float]) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with a factor on epsilon for some parameters of the model; the state is the same."""
    plain = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.epsilon)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moved, state = plain.update(updates, state, params)
        mean = optax.tree.bias_correction(state.mu, config.b1, state.count)["model"]
        square = optax.tree.bias_correction(state.nu, config.b2, state.count)["model"]
        mean, square, model = models.flatten(mean), models.flatten(square), models.flatten(moved["model"])
        for name, factor in epsilons.items():
            model[name] = mean[name] / (jnp.sqrt(square[name]) + factor * config.epsilon)
        return {**moved, "model": models.unflatten(model)}, state

    return optax.GradientTransformation(plain.init, update)
