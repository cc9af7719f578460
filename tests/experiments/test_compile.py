"""The compile command on a tiny variant of the large recipe, by the real TPU compiler; its models, from the config alone."""

import json
import subprocess
import sys
import types
from typing import Any

import jax
import pytest

from configs import kwaicoder_23b_a4b
from experiments import compile as compile_command
from experiments import compile_kernels, compile_steps, recipe_models
from experiments.contract import Context, Section
from experiments.display import Display
from experiments.stopping import Stop
from kernels.grouped_matmul import tpu_combine, tpu_mlp, tpu_outer
from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import collectives, hlo, work
from tests.experiments import commands

TINY = {
    "model.layers": 3, "model.model_dim": 512, "model.mlp_dim": 4096, "model.heads": 4, "model.kv_heads": 2,
    "model.vocab_size": 1024, "prune.target.layers": 2, "prune.target.model_dim": 256, "prune.target.mlp_dim": 2048,
    "upcycle.granularity": 4, "upcycle.replicas": 2, "cpt.phases.phase1.batch_size": 4,
    "cpt.phases.phase1.sequence_length": 256, "loader.streams": 4,
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
    assert short["mesh"]["context"] == long["mesh"]["context"] == 1
    # As many rows or more than groups of chips: 32 on 64, 128 on 512, 32 on 256, 16 on 64.
    machines = {"v5p-64": 2, "v5p-512": 4, "v5e-256": 8, "h100-64": 2}
    assert {name: section(f"32k,{name}")["mesh"]["context"] for name in machines} == machines
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
    # Forward twice, backward; 32 rows of an expert on average, of which a group computes up to 46 and drhs 142 in vain.
    assert 1.2 < summary["flops_ratio"] < 8
    kinds = {each["kind"] for each in summary["collectives"]}
    assert "all-gather" in kinds
    module = hlo.parse((tmp_path / "step.hlo").read_text())
    found = work.measure(module, compile_kernels.kernel_work(models.Runtime()))
    assert {*tpu_mlp.KERNELS, tpu_outer.NAME, tpu_combine.NAME} <= set(found.by_kind)
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
    kernels = {"grouped_product_gpu", "grouped_outer_gpu", "mha_forward", "mha_backward"}
    assert kernels <= set(found.by_kind)
    assert not found.unknown_loops
    assert not found.unknown_kernels


@pytest.mark.slow
def test_a_tiny_step_whose_time_is_split(tmp_path):
    """Keys and values are gathered along context and their gradients scattered; the kernels run on chunks of queries."""
    split = ("--config.mesh.context=2", "--config.cpt.phases.phase1.sequence_length=1024")
    done = compile_tiny(tmp_path, "v5p:2x2x1", "--config.runtime.remat=full", *split, f"--text={tmp_path / 'step.hlo'}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "compile/cpt/v5p_2x2x1/summary.json").read_text())
    mixture = recipe_models.model_before(_tiny(), "cpt")
    assert summary["model_flops_per_chip"] == pytest.approx(1024 * models.train_flops_per_token(mixture, 1024))
    counts = {(each["kind"], *each["axes"]): each["count"] for each in summary["collectives"]}
    assert counts["reduce-scatter", "context"] == 2 * mixture.layers
    assert ("collective-permute", "context") in counts
    module = hlo.parse((tmp_path / "step.hlo").read_text())
    found = [each for each in collectives.find(module) if each.axes(AXES, (1, 2, 1, 1, 2)) == ("context",)]
    gathers = [each for each in found if each.kind == "all-gather" and each.payload_bytes > 2**16]
    # Keys and values, forward and once more backward; no hidden states.
    assert sum(each.times for each in gathers) == 4 * mixture.layers
    kernels = work.measure(module, compile_kernels.kernel_work(models.Runtime())).by_kind
    splash = {name: flops for name, flops in kernels.items() if name.startswith("splash")}
    assert len(splash) == 2
    # Of the square's 16 blocks on 2 rows of 2 chips each has 5; 2 products forward (done twice), 5 backward.
    block = 2.0 * mixture.heads * 256**2 * mixture.head_dim
    assert sum(splash.values()) == pytest.approx(mixture.layers * 2 * 5 * (2 * 2 + 5) * block)


@pytest.mark.slow
def test_a_tiny_step_by_exchange_for_tpu(tmp_path):
    arguments = ("--config.runtime.remat=full", "--config.mesh.expert=2", "--config.runtime.dispatch=exchange")
    done = compile_tiny(tmp_path, "v5e:2x2", *arguments)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "compile/cpt/v5e_2x2/summary.json").read_text())
    (ragged,) = [each for each in summary["collectives"] if each["kind"] == "ragged-all-to-all"]
    # In each of two layers: there and back, there once more for the gradient, its own way there and back.
    assert (ragged["axes"], ragged["count"]) == (["expert"], 2 * 5)
    rows, width = 256 * 4, 256  # of a chip: 256 tokens, 4 experts each; half of them stay
    assert ragged["wire_bytes"] == 2 * 5 * rows * width * 2 / 2


@pytest.mark.slow
def test_generation_on_a_mesh_of_tpus(tmp_path):
    """A mixture's prompt, which is one row for four chips, and a decode step."""
    done = compile_tiny(tmp_path, "v5e:2x2", "--step=generate", "--rows=6", "--cache_tokens=300", "--prompt_tokens=100")
    assert done.returncode == 0, done.stderr
    assert "tokens per second" in done.stdout
    summary = json.loads((tmp_path / "compile/generate/v5e_2x2/summary.json").read_text())
    assert {name: summary[name] for name in ("rows", "slots", "prompt_slots", "chunk", "chips", "fits")} == {
        "rows": 8, "slots": 512, "prompt_slots": 128, "chunk": 128, "chips": 4, "fits": True,
    }  # fmt: skip
    mixture = recipe_models.model_before(_tiny(), "generate")
    assert summary["model_flops_per_chip"] == pytest.approx(8 * models.decode_flops_per_token(mixture, 512) / 4)
    assert summary["prefill"]["model_flops_per_chip"] == pytest.approx(
        128 * models.forward_flops_per_token(mixture, 128, logits=False) / 4
    )
    caches = 2 * 2 * (8 / 4) * 2 * 512 * 128 * 2  # layers, keys and values, rows of a chip, heads, slots, width, bytes
    assert caches <= summary["cache_bytes_per_chip"] <= 1.1 * caches
    assert summary["engine_bytes_per_chip"] >= summary["hbm_bytes_per_chip"]
    for name in ("decode", "prefill"):
        assert summary[f"{name}_tokens_per_second_bound"] > 0


@pytest.mark.slow
def test_a_tiny_step_in_int8_for_tpu(tmp_path):
    done = compile_tiny(
        tmp_path, "v5e:2x2", "--config.runtime.remat=full", "--config.cpt.quantization=int8",
        "--config.cpt.quantize_gradients=True", f"--text={tmp_path / 'step.hlo'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = work.measure(hlo.parse((tmp_path / "step.hlo").read_text()), compile_kernels.kernel_work(models.Runtime()))
    # Two layers' four projections of 256 tokens, 256 wide, by 4 + 2 * 2 + 4 heads of 128; forward twice, and of inputs.
    assert found.by_kind["matmul s8"] == 3 * 2 * 2 * 256 * 256 * 128 * (4 + 2 + 2 + 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--step=generate", "--search"), "--search: does not search for generate"),
        (("--step=generate", "--phase=phase3"), "--phase: generate has no phases"),
        (("--step=cpt", "--rows=8"), "--rows: is not of cpt"),
    ],
)
def test_flags_of_another_step_are_refused(tmp_path, arguments, words):
    done = compile_tiny(tmp_path, "v5e:2x2", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


AXES = ("data", "fsdp", "expert", "tensor", "context")


def _tiny():
    config = kwaicoder_23b_a4b.get_config()
    config.update_from_flattened_dict(TINY)
    return Section(config.to_dict())


def test_one_phase_alone():
    config = section("32k")
    assert compile_command.of_phase(config, "cpt", None) is config
    alone = compile_command.of_phase(config, "cpt", "phase3")
    assert [spec["sequence_length"] for spec in alone["cpt"]["phases"].values()] == [32_768]
    assert len(config["cpt"]["phases"]) == 3
    with pytest.raises(UserError, match=r"phase: there is no last; the phases of cpt are phase1, phase2, phase3"):
        compile_command.of_phase(config, "cpt", "last")


@pytest.mark.parametrize(("argument", "phase", "tokens"), [("", None, 256 * 4096), ("32k", "phase3", 32 * 32_768)])
def test_the_batch_of_a_step_without_a_work_folder(argument, phase, tokens):
    config = compile_command.of_phase(section(argument), "cpt", phase)
    machine: Any = types.SimpleNamespace(devices=jax.devices()[:1] * 64)
    context = Context(compile_command.STAGE, config, None, Display(), Stop())
    made = compile_steps.make(context, "cpt", machine)
    rows, time = made.arguments[1]["inputs"].shape
    assert rows * time == tokens
    share = config["mesh"]["context"]
    assert made.arguments[1]["inputs"].sharding.shard_shape((rows, time)) == (rows * share // 64, time // share)


def test_a_machine_that_there_is_not(tmp_path):
    done = compile_tiny(tmp_path, "v5p:4x4")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "v5p is a torus of 3 axes" in done.stderr
    assert not (tmp_path / "compile").exists()
