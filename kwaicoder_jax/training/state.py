"""What a train step carries: the step number, the trainable tree, the optimizer's state; and where each lives."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kwaicoder_jax import models
from kwaicoder_jax.training.mesh import param_shardings, replicated


@flax.struct.dataclass
class TrainState:
    """`trainable` is {"model": params, **extras}; extras are trained beside the model and dropped afterwards."""

    step: Any
    trainable: Any
    opt_state: Any


def make_state(trainable: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def state_shardings(
    trainable: Any, optimizer: optax.GradientTransformation, config: models.ModelConfig, mesh: Mesh
) -> TrainState:
    """The state's tree of shardings: moments lie where their parameters lie, everything else on every device."""
    everywhere = replicated(mesh)
    places = jax.tree.map(lambda _: everywhere, trainable)
    places["model"] = param_shardings(config, mesh)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    moments = optax.tree_map_params(
        optimizer, lambda _, place: place, opt_state, places, transform_non_params=lambda _: everywhere
    )
    return TrainState(everywhere, places, moments)


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """ShapeDtypeStructs of a state, each with its sharding: what a restore reads into."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, shardings)
