"""How a recipe computes its models, and its train steps."""

import types

import jax
import pytest

from experiments import language_model, training_stage
from experiments.training_stage import runtime_from, runtime_of, training_runtime_of
from kwaicoder_jax import models, testing, training
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


def test_a_stage_that_does_not_train_shares_whole_rows(monkeypatch):
    seen = []
    monkeypatch.setattr(training_stage.training, "make_mesh", lambda config, *rest: seen.append(config))
    for together in (True, False):
        given = context()
        given.config["mesh"] = {"data": 1, "fsdp": 2, "context": 4}
        given.stage.together = together
        training_stage.mesh_of(given)
    assert [(config.fsdp, config.context) for config in seen] == [(2, 4), (8, 1)]


def test_a_capacity_that_cannot_be_counted_is_refused_before_anything_is_read():
    split = training.make_mesh(training.MeshConfig(data=1, context=2), jax.devices()[:1] * 2)
    mixture = testing.dense_config().replace(experts=models.ExpertsConfig(4, 2, 8))
    capped = training.BalanceConfig(capacity_factor=1.0)
    language_model.check_capacity(capped, mixture, "cpt.balance", MESH)
    with pytest.raises(UserError, match=r"^cpt\.balance\.capacity_factor: a capacity counts .*mesh\.context to 1$"):
        language_model.check_capacity(capped, mixture, "cpt.balance", split)
    with pytest.raises(UserError, match=r"^cpt\.balance\.capacity_factor: the model has no experts"):
        language_model.check_capacity(capped, testing.dense_config(), "cpt.balance", MESH)


def test_what_reads_a_disk_says_so():
    training_stage.on_disk(types.SimpleNamespace(folder="/mnt/run/prepare_data"), "a corpus is read from a disk")
    with pytest.raises(UserError, match=r"^--workdir: a corpus is read from a disk; use a folder that all hosts see"):
        training_stage.on_disk(types.SimpleNamespace(folder="gs://b/run/prepare_data"), "a corpus is read from a disk")
