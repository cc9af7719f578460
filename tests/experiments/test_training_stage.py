"""How a recipe computes its models, and its train steps."""

import types

import jax
import pytest

from experiments.training_stage import runtime_from, runtime_of, training_runtime_of
from kwaicoder_jax import training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import Quantization

MESH = training.make_mesh(training.MeshConfig(), jax.devices()[:1])


def context(section=None, runtime=None):
    return types.SimpleNamespace(
        config={"runtime": {"remat": "full"} | (runtime or {})}, section=section or {},
        stage=types.SimpleNamespace(name="cpt"),
    )  # fmt: skip


def test_a_train_step_alone_is_quantised():
    given = context({"quantization": "int8", "quantize_gradients": True})
    step, others = training_runtime_of(given, MESH), runtime_of(given, MESH)
    assert (step.quantization, step.quantize_gradients, step.remat, step.platform) == (
        Quantization.INT8, True, "full", "cpu",
    )  # fmt: skip
    assert others.quantization is Quantization.NONE
    assert training_runtime_of(context(), MESH) == runtime_of(context(), MESH)


def test_what_cannot_be():
    with pytest.raises(UserError, match=r"^cpt\.quantization: no choice 'int4'; use none, int8, fp8$"):
        training_runtime_of(context({"quantization": "int4"}), MESH)
    with pytest.raises(UserError, match=r"^runtime\.quantization: changes what a stage leaves; .*cpt\.quantization$"):
        runtime_from(context(runtime={"quantization": "int8"}).config)
