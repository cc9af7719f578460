"""What the implementations of the expert MLP exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices

PROJECTIONS = "projections"  # name of what Saved holds, for `jax.checkpoint` policies

Activation = Callable[[jax.Array], jax.Array]


class Arguments(NamedTuple):
    """What the expert MLP is differentiable in; its gradients have the same form, and None where matrices are quantized."""

    x_MD: jax.Array
    weight_MX: jax.Array
    gate_EDF: Matrices
    up_EDF: Matrices
    down_EFD: Matrices

    @property
    def is_scaled(self) -> bool:
        """Whether a matrix is quantized."""
        return any(isinstance(each, ScaledMatrices) for each in self[2:])


Gradients = Arguments


class Saved(NamedTuple):
    """What the forward pass keeps: both projections, rows in expert order."""

    gate_RF: jax.Array
    up_RF: jax.Array


def named(saved: Saved) -> Saved:
    """The same, under the name that a policy may keep."""
    return Saved(*(checkpoint_name(x_RF, PROJECTIONS) for x_RF in saved))


def gated(activation: Activation, gate_RF: jax.Array, up_RF: jax.Array) -> jax.Array:
    """activation(gate) * up in float32: what enters the down projection."""
    return activation(gate_RF.astype(jnp.float32)) * up_RF.astype(jnp.float32)
