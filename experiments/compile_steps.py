"""The steps of a recipe as functions of shapes: what `cpt` and the others would run, on a machine that is not here."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments import recipe_models
from experiments.training_stage import build, phases_of
from kwaicoder_jax import hardware, models, training


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled step's ingredients.

    Attributes:
      function: jitted.
      arguments: shapes with shardings.
      mesh: over the machine.
      model_flops: of one step, of all chips.
      model: what is trained.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    model_flops: float
    model: models.ModelConfig


def cpt(config: Mapping[str, Any], machine: hardware.Topology) -> Step:
    """The train step of the mixture, in the first phase."""
    model = recipe_models.model_before(config, "cpt")
    section, mesh = config["cpt"], mesh_of(config, machine)
    runtime = runtime_of(config, mesh)
    balance = build(training.BalanceConfig, section["balance"], "cpt.balance")

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return training.language_model_loss(trainable["model"], model, batch, runtime=runtime, balance=balance)

    return training_step(section, "cpt", model, loss, {}, mesh, models.train_flops_per_token)


def training_step(
    section: Any, name: str, model: models.ModelConfig, loss: training.LossFunction, frozen: Any, mesh: Mesh,
    flops_per_token: Callable[[models.ModelConfig, int], float],
) -> Step:  # fmt: skip
    """The step of a training stage on batches of its first phase."""
    phases = phases_of(section, name)
    rate, phase = training.join(phases.rates), phases.data[0]
    optimizer = training.make_optimizer(
        build(training.OptimizerConfig, section["optimizer"], f"{name}.optimizer"), rate, model
    )
    trainable = {"model": training.abstract_params(model, mesh)}
    shardings = training.state_shardings(trainable, optimizer, model, mesh)
    state = jax.eval_shape(lambda tree: training.make_state(tree, optimizer), trainable)
    step = training.make_step(loss, optimizer, rate, shardings)
    batch = abstract_batch(phase.batch_size, phase.sequence_length, mesh)
    flops = flops_per_token(model, phase.sequence_length) * phase.batch_size * phase.sequence_length
    return Step(step, (training.abstract_state(state, shardings), batch, frozen), mesh, flops, model)


def abstract_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the loader, as shapes on the mesh."""
    training.check_rows(rows, mesh)
    dtypes = {name: jnp.int32 for name in ("inputs", "targets", "positions", "segment_ids")}
    place = training.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
        for name, dtype in {**dtypes, "loss_mask": jnp.float32}.items()
    }


def mesh_of(config: Mapping[str, Any], machine: hardware.Topology) -> Mesh:
    """The recipe's mesh, over that machine."""
    return training.make_mesh(build(training.MeshConfig, config.get("mesh", {}), "mesh"), machine.devices)


def runtime_of(config: Mapping[str, Any], mesh: Mesh) -> models.Runtime:
    """How the recipe computes its models, on that mesh."""
    runtime = build(models.Runtime, config.get("runtime", {}), "runtime")
    return dataclasses.replace(runtime, platform=runtime.platform or training.platform_of(mesh))


STEPS: Mapping[str, Callable[[Mapping[str, Any], hardware.Topology], Step]] = {"cpt": cpt}
