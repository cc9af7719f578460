"""Losses and gradients with time split over devices, held against one device; prints the largest relative errors as JSON."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import distillation, models, testing, training
from kwaicoder_jax.training import MeshConfig
from tests.kwaicoder_jax.training import mesh_variants

# The selection bias sends every token to experts 1 and 4.
BIASED = mesh_variants.DENSE.replace(
    experts=models.ExpertsConfig(6, 2, 24, "sigmoid", router_bias=True, shared_mlp_dim=10)
)
PAIRS = ((0, 1),)
TEACHER = mesh_variants.DENSE.replace(layers=2, model_dim=24)
SETTINGS = distillation.DistillConfig(temperature=2.0, cross_entropy=0.3)


def crowded() -> Any:
    params = testing.random_params(BIASED)
    bias_LE = jnp.full((1, 6), -10.0).at[:, jnp.array([1, 4])].set(10.0)
    return {**params, "layers": {**params["layers"], "moe": {**params["layers"]["moe"], "router_bias": bias_LE}}}


def distilled(mesh_config: MeshConfig, top_k: int | None) -> dict[str, Any]:
    """The loss, its metrics and gradients; with `top_k` from the teacher's likeliest tokens alone, and these."""
    mesh = training.make_mesh(mesh_config, jax.devices()[: mesh_variants.devices_of(mesh_config)])
    student, teacher = mesh_variants.MOE, testing.random_params(TEACHER, seed=1)
    first = distillation.initial_projections(PAIRS, list(range(student.model_dim))[:24], 24)
    rng = np.random.default_rng(2)
    projections = jax.tree.map(lambda x: rng.standard_normal((*x.shape[:-2], 32, 24)).astype(np.float32), first)
    trainable = {"model": testing.random_params(student), "projections": projections}
    batch = training.shard_batch(testing.random_batch(student, 4, 16), mesh)
    places = {"model": training.param_shardings(student, mesh), "projections": training.replicated(mesh)}
    trainable = jax.device_put(trainable, places)
    teacher = jax.device_put(teacher, training.param_shardings(TEACHER, mesh))
    settings = SETTINGS if top_k is None else distillation.DistillConfig(temperature=2.0, hidden=False)
    shards = mesh.size // mesh.shape["tensor"] // mesh.shape["context"]
    found = {}
    if top_k is not None:
        stored = jax.jit(functools.partial(likeliest, top_k, shards), out_shardings=training.row_sharding(mesh))
        top = stored(teacher, batch)
        found = {"ids": top.ids_BTK, "log_p": top.log_p_BTK, "tail": top.log_tail_BT}
        host = {"ids_BTK": top.ids_BTK, "log_p_BTK": top.log_p_BTK, "log_tail_BT": top.log_tail_BT}
        batch |= training.shard_batch({name: np.asarray(x) for name, x in host.items()}, mesh)
    loss = functools.partial(
        distillation.distillation_loss, student_config=student, teacher_config=None if top_k else TEACHER, pairs=PAIRS,
        config=settings, runtime=models.Runtime(), shards=shards,
    )  # fmt: skip
    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, batch, teacher)
    found |= {"value": value, **metrics, **models.flatten(gradients["model"])}
    return jax.device_get(found if top_k else found | gradients["projections"])


def likeliest(count: int, shards: int, teacher: Any, batch: Any) -> distillation.TopK:
    output = training.run_model(teacher, TEACHER, batch, models.Runtime())
    settings = distillation.LogitsSettings(temperature=2.0, top_k=count, shards=shards)
    return distillation.teacher_top_k(settings, output.hidden_BTD, models.projection(teacher))


def errors(name: str, got: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest difference over each array's largest entry."""
    sizes = {key: max(float(np.max(np.abs(x))), 1e-6) for key, x in expected.items()}
    return {f"{name} {k}": float(np.max(np.abs(got[k] - x))) / sizes[k] for k, x in expected.items()}


def main() -> None:
    result = {}
    balance = training.BalanceConfig(load=0.1, z=0.01, sequence=0.3)
    # A buffer of even routing, and a mesh on which time alone is split.
    for name, params, mesh, dispatch in (
        ("crowded", crowded, MeshConfig(data=1, expert=2, context=4), "tokens"),
        ("even", lambda: testing.random_params(BIASED), MeshConfig(data=1, context=4), "weights"),
    ):
        runtime = models.Runtime(dispatch=dispatch, expert_buffer=1.0)
        one = mesh_variants.step_on(BIASED, MeshConfig(data=1), params=params(), balance=balance)
        assert (one[0]["expert_load_max_over_mean"] > 2.99) == (name == "crowded")
        found = mesh_variants.step_on(BIASED, mesh, runtime, params=params(), balance=balance)
        for kind, got, expected in zip(("metrics", "gradients"), found, one):
            result |= errors(f"{name} {kind}", got, expected)
    for mesh, top_k in ((MeshConfig(data=1, fsdp=2, context=2), None), (MeshConfig(data=1, expert=2, context=2), 5)):
        result |= errors(f"distilled {top_k}", distilled(mesh, top_k), distilled(MeshConfig(data=1), top_k))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
