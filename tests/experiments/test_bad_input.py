"""Bad input: one line that says what, where and what would be right; exit status 2; nothing half-written."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kwaicoder_jax import checkpoints
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.evaluation import benchmarks
from tests.experiments import commands


def refused(stage: str, workdir, *arguments: str, config: str = commands.TINY) -> str:
    output = commands.run(stage, workdir, *arguments, status=2, config=config)
    assert output.startswith("error: ")
    assert output.count("\n") == 1, output
    return output


def test_unknown_config_field(tmp_path):
    output = refused("pretrain", tmp_path, "--config.pretrain.stepz=3")
    assert "config.pretrain.stepz" in output
    assert "steps" in output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.pretrain.steps=many"], "config.pretrain.steps"),
        (["--confg=x"], "confg"),
        (["surplus"], "surplus"),
    ],
)
def test_wrong_flags(tmp_path, arguments, words):
    assert words in refused("pretrain", tmp_path, *arguments)


def test_missing_config_file(tmp_path):
    assert "nowhere.py" in refused("pretrain", tmp_path, config="configs/nowhere.py")


def test_stage_before_its_input(tmp_path):
    output = refused("cpt", tmp_path)
    assert "prepare_data" in output
    assert "run prepare_data first" in output


def test_no_stage(tmp_path):
    assert "is no list of stages" in refused("pipeline", tmp_path, "--config.stages=()")


def test_restarts_that_contradict_each_other(tmp_path):
    assert "does not go with --restart" in refused("pipeline", tmp_path, "--restart", "--restart_from=cpt")
    assert "the stages are prepare_data, pretrain" in refused("pipeline", tmp_path, "--restart_from=upcyle")


def test_unknown_source_field(tmp_path):
    assert "no stage 'nonsense'" in refused("pipeline", tmp_path, "--config.stages=prepare_data,nonsense")


@pytest.fixture
def work(finished, tmp_path) -> pathlib.Path:
    for name in ("prepare_data", "distill"):
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.upcycle.granularity=5", ["upcycle.granularity", "32"]),
        ("--config.upcycle.experts_per_token=3", ["upcycle.experts_per_token", "allow_lossy"]),
        ("--config.upcycle.router=softmax_topk", ["upcycle.router", "allow_lossy"]),
        ("--config.upcycle.scale_placement=cube_root", ["upcycle.scale_placement", "allow_lossy"]),
        ("--config.upcycle.drop_ratio=0.5", ["upcycle.drop_ratio", "allow_lossy"]),
        ("--config.upcycle.shared_neurons=6", ["upcycle.shared_neurons", "4, 8"]),
        ("--config.upcycle.init_from=/nonexistent/folder", ["upcycle.init_from", "/nonexistent/folder"]),
        ("--config.mesh.data=3", ["mesh"]),
    ],
)
def test_upcycle_refuses(work, argument, words):
    output = refused("upcycle", work, argument)
    for word in words:
        assert word in output
    assert not (work / "upcycle" / "summary.json").exists()


def test_foreign_checkpoint(work, tmp_path):
    import numpy as np
    import orbax.checkpoint as ocp

    foreign = tmp_path / "foreign" / "checkpoints"
    with ocp.CheckpointManager(foreign) as manager:
        items = ocp.args.Composite(params=ocp.args.StandardSave({"w": np.ones(3)}), meta=ocp.args.JsonSave({"x": 1}))
        manager.save(0, args=items)
    output = refused("upcycle", work, f"--config.upcycle.init_from={tmp_path / 'foreign'}")
    assert "not a checkpoint of this program" in output


def test_a_checkpoint_of_another_shape_than_its_config(work):
    """In a process of its own: what is wrong must not be found by threads that say so as they die."""
    with contextlib.closing(checkpoints.CheckpointStore(work / "distill" / "checkpoints")) as store:
        step = store.latest_step()
        meta = store.meta(step)
    meta["model"]["mlp_dim"] *= 2
    (work / "distill" / "checkpoints" / str(step) / "meta" / "metadata").write_text(json.dumps(meta))
    output = refused("upcycle", work)
    assert "upcycle.init_from" in output
    assert "has shape (2, 32, 24), the config says (2, 64, 24)" in output
    assert not (work / "upcycle").exists()


def test_lossy_is_possible_when_asked_for(work):
    output = commands.run("upcycle", work, "--config.upcycle.experts_per_token=3", "--config.upcycle.allow_lossy=True")
    summary = commands.summary(work / "upcycle")
    assert summary["lossless"] is False
    assert summary["max_relative_logit_error"] > 1e-3
    assert summary["loss_jump"] == summary["valid_loss_moe"] - summary["valid_loss_dense"] != 0
    assert f"jump {summary['loss_jump']:+.4f}" in output
    assert "lossy: 3 is not a multiple of granularity 4" in output


def test_what_needs_calibration_is_measured(work):
    """Shared neurons, clusters and centroids in one command, and still lossless."""
    options = {
        "shared_neurons": 8,
        "shared_gate": True,
        "partition": "coactivation,balanced",
        "router_init": "centroids",
    }
    commands.run("upcycle", work, *(f"--config.upcycle.{name}={value}" for name, value in options.items()))
    summary = commands.summary(work / "upcycle")
    assert summary["lossless"] is True
    assert summary["max_relative_logit_error"] <= 1e-5
    assert summary["broken_groups"] == 0


def test_empty_corpus(tmp_path):
    (tmp_path / "nothing").mkdir()
    config = tmp_path / "empty.py"
    config.write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny', {str(commands.ROOT / commands.TINY)!r})\n"
        "tiny = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(tiny)\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        f"    source = {{'kind': 'folder', 'path': {str(tmp_path / 'nothing')!r}, 'suffixes': ('.py',), 'max_bytes': 9999}}\n"
        "    config.prepare_data.sources = {'mine': source}\n"
        "    return config\n"
    )
    output = refused("prepare_data", tmp_path / "work", config=str(config))
    assert "mine" in output
    assert not (tmp_path / "work" / "prepare_data" / "corpus").exists()


def test_read_only_work_folder(tmp_path):
    """For root no folder is read-only by its mode, so the folder is mounted read-only in a namespace of the command."""
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    if os.geteuid() != 0:
        output = refused("prepare_data", place)
    else:
        mount = f"mount --bind {place} {place} && mount -o remount,ro,bind {place} && exec "
        command = [sys.executable, "-m", "experiments.prepare_data", f"--config={commands.TINY}", f"--workdir={place}"]
        process = subprocess.run(
            ["unshare", "-m", "sh", "-c", mount + " ".join(command)], cwd=commands.ROOT, env=commands.environment(),
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        output = process.stderr
        assert process.returncode == 2, output
    assert output.startswith("error: ")
    assert output.count("\n") == 1, output
    assert str(place) in output
    assert not list(place.iterdir())


def test_a_work_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused("prepare_data", tmp_path / "file")


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[1]\n"])
def test_samples_that_are_none(tmp_path, content):
    samples = tmp_path / "samples.jsonl"
    if content is not None:
        samples.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.jsonl"):
        benchmarks.read_samples(samples)


def _catches(process: subprocess.Popen, number: int) -> bool:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_stopped_while_it_imports(tmp_path):
    """The handler stands before jax is imported."""
    process = commands.start("pretrain", tmp_path / "work", "--preempt_exit_code=7")
    while not _catches(process, signal.SIGTERM):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 7, output
    assert output == "stopped; the same command goes on from here\n"
