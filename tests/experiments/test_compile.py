"""The compile command on a tiny variant of the large recipe, by the real TPU compiler; its models, from the config alone."""

import json
import subprocess
import sys

import pytest

from configs import kwaicoder_23b_a4b
from experiments import compile_kernels, recipe_models
from experiments.contract import Section
from kwaicoder_jax import models
from kwaicoder_jax.hardware import hlo, work
from tests.experiments import commands

TINY = {
    "model.layers": 3, "model.model_dim": 512, "model.mlp_dim": 4096, "model.heads": 4, "model.kv_heads": 2,
    "model.vocab_size": 1024, "prune.target.layers": 2, "prune.target.model_dim": 256, "prune.target.mlp_dim": 2048,
    "upcycle.granularity": 4, "upcycle.replicas": 2, "cpt.phases.phase1.batch_size": 4,
    "cpt.phases.phase1.sequence_length": 256,
}  # fmt: skip


def section(argument=""):
    return Section(kwaicoder_23b_a4b.get_config(argument).to_dict())


def test_sizes_of_the_published_model():
    mixture = recipe_models.model_before(section(), "cpt")
    assert models.count(mixture) / 1e9 == pytest.approx(23.0, abs=0.1)
    assert models.count_active(mixture) / 1e9 == pytest.approx(4.1, abs=0.1)
    assert not mixture.qkv_bias
    qwen = recipe_models.model_before(section("qwen,v5p-512"), "cpt")
    assert models.count(qwen) / 1e9 == pytest.approx(23.0, abs=0.1)
    assert qwen.qkv_bias
    assert recipe_models.teacher_of(section()).layers == 32


def test_a_longer_last_phase_keeps_the_tokens_of_a_batch():
    short, long = section(), section("8k")
    tokens = {
        config["cpt"]["phases"]["phase3"]["batch_size"] * config["cpt"]["phases"]["phase3"]["sequence_length"]
        for config in (short, long)
    }
    assert tokens == {256 * 4096}
    with pytest.raises(ValueError, match="no variant 'v7'"):
        kwaicoder_23b_a4b.get_config("v7")


def compile_tiny(tmp_path, topology, *arguments):
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    command = [
        sys.executable, "-m", "experiments.compile", "--config=configs/kwaicoder_23b_a4b.py", f"--topology={topology}",
        f"--workdir={tmp_path}", *overrides, *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, cwd=commands.ROOT, env=commands.environment(), capture_output=True, text=True, timeout=550
    )


def test_a_tiny_step_for_tpu(tmp_path):
    done = compile_tiny(tmp_path, "v5e:2x2", "--config.runtime.remat=full", f"--text={tmp_path / 'step.hlo'}")
    assert done.returncode == 0, done.stderr
    assert "MFU at most" in done.stdout
    summary = json.loads((tmp_path / "compile/cpt/v5e_2x2/summary.json").read_text())
    assert summary["fits"]
    assert summary["chips"] == 4
    mixture = recipe_models.model_before(_tiny(), "cpt")
    tokens = 4 * 256 / 4
    assert summary["model_flops_per_chip"] == pytest.approx(tokens * models.train_flops_per_token(mixture, 256))
    # Forward twice, backward; tiles of 128 rows where an expert has 32 on average.
    assert 1.2 < summary["flops_ratio"] < 8
    kinds = {each["kind"] for each in summary["collectives"]}
    assert "all-gather" in kinds
    module = hlo.parse((tmp_path / "step.hlo").read_text())
    found = work.measure(module, compile_kernels.kernel_work(models.Runtime()))
    assert {"gmm", "tgmm"} <= set(found.by_kind)
    assert any(name.startswith("splash") for name in found.by_kind)
    assert not found.unknown_loops
    assert not found.unknown_kernels


def test_a_tiny_step_for_gpu(tmp_path):
    pytest.importorskip("jax_plugins.xla_cuda13", reason="jax's CUDA plugin is not installed")
    hlo_file = tmp_path / "step.hlo"
    done = compile_tiny(tmp_path, "h100:4", "--config.runtime.remat=full", f"--text={hlo_file}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "compile/cpt/h100_4/summary.json").read_text())
    assert summary["fits"]
    assert 1.2 < summary["flops_ratio"] < 8
    kinds = {each["kind"] for each in summary["collectives"]}
    assert {"all-gather", "reduce-scatter"} <= kinds
    mixture = recipe_models.model_before(_tiny(), "cpt")
    experts = mixture.experts
    assert experts is not None
    matrices = 2 * 3 * experts.num_experts * mixture.model_dim * experts.mlp_dim  # bytes of a layer's experts
    sums = [each for each in summary["collectives"] if each["kind"] == "all-reduce"]
    assert sum(each["wire_bytes"] for each in sums) < matrices / 4  # gradients are scattered
    module = hlo.parse(hlo_file.read_text())
    found = work.measure(module, compile_kernels.kernel_work(models.Runtime()))
    kernels = {"grouped_rows_gpu", "grouped_outer_gpu", "mha_forward", "mha_backward"}
    assert kernels <= set(found.by_kind)
    assert not found.unknown_loops
    assert not found.unknown_kernels


def _tiny():
    config = kwaicoder_23b_a4b.get_config()
    config.update_from_flattened_dict(TINY)
    return Section(config.to_dict())


def test_a_machine_that_there_is_not(tmp_path):
    done = compile_tiny(tmp_path, "v5p:4x4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "v5p is a torus of 3 axes" in done.stderr
    assert not (tmp_path / "compile").exists()
