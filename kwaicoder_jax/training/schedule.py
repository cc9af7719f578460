"""Learning-rate laws, one per phase, joined at exact steps."""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from kwaicoder_jax.errors import UserError


class Law(enum.StrEnum):
    """How the rate goes from `peak` to `end` after the warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    ONE_MINUS_SQRT = "1-sqrt"  # Hägele et al. 2024


@dataclasses.dataclass(frozen=True)
class PhaseRate:
    """The rate during one phase.

    Attributes:
      steps: length of the phase.
      peak: rate after the warm-up.
      end: rate at the end of the phase (unused by the constant law).
      warmup: steps of linear rise to `peak`, from `start`.
      law: the law after the warm-up.
      start: rate before the first step of the warm-up.
    """

    steps: int
    peak: float
    end: float = 0.0
    warmup: int = 0
    law: str = "cosine"
    start: float = 0.0

    def __post_init__(self):
        if self.law not in list(Law):
            raise UserError(f"no law {self.law!r}", where="rate.law", remedy=f"one of {[str(x) for x in Law]}")
        if not 0 <= self.warmup <= self.steps:
            raise UserError(
                f"{self.warmup} of {self.steps} steps", where="rate.warmup_share", remedy="use a share from 0 to 1"
            )
        for name in ("peak", "end", "start"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise UserError(f"{value} is not a learning rate", where=f"rate.{name}", remedy="use 0 or more")


def phase_rate(phase: PhaseRate, step: jax.Array) -> jax.Array:
    """The rate at `step` of the phase (0 is its first step)."""
    step = jnp.asarray(step, jnp.float32)
    rising = phase.start + (phase.peak - phase.start) * (step + 1) / max(phase.warmup, 1)
    progress = jnp.clip((step - phase.warmup) / max(phase.steps - phase.warmup, 1), 0.0, 1.0)
    remaining = {
        Law.CONSTANT: jnp.ones_like(progress),
        Law.COSINE: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        Law.LINEAR: 1 - progress,
        Law.ONE_MINUS_SQRT: 1 - jnp.sqrt(progress),
    }[Law(phase.law)]
    falling = phase.end + (phase.peak - phase.end) * remaining
    return jnp.where(step < phase.warmup, rising, falling)


def join(phases: Sequence[PhaseRate]) -> Callable[[jax.Array], jax.Array]:
    """The rate over all phases, as a function of the global step; after the last phase it stays where that ended."""

    def rate(step: jax.Array) -> jax.Array:
        value, first = jnp.zeros((), jnp.float32), 0
        for phase in phases:
            here = jnp.clip(step - first, 0, phase.steps)
            value = jnp.where(step >= first, phase_rate(phase, here), value)
            first += phase.steps
        return value

    return rate
