"""Distillation in processes: a corrected teacher, mixtures, and a teacher that is read from its cache."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest

from kwaicoder_jax import distillation
from tests.experiments import commands

PLAIN = ("--config.distill.loss.hidden=False", "--config.distill.baseline=False")
CACHED = (*PLAIN, "--config.distill.cache=cache_teacher")


def copied(finished, folder, *stages):
    for name in stages:
        shutil.copytree(finished / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def work(finished, tmp_path_factory):
    """A folder up to the pruned student, with a cache."""
    folder = copied(finished, tmp_path_factory.mktemp("cached"), "prepare_data", "pretrain", "prune")
    commands.run("cache_teacher", folder)
    return folder


def test_training_from_the_cache_is_training_from_the_live_top_k(work, tmp_path):
    """To float rounding, and with no teacher in the folder."""
    live, cached = (copied(work, tmp_path / name, "prepare_data", "prune") for name in ("live", "cached"))
    copied(work, live, "pretrain")
    copied(work, cached, "cache_teacher")
    commands.run("distill", live, *PLAIN, "--config.distill.loss.top_k=20")
    commands.run("distill", cached, *CACHED)
    ours, theirs = (commands.records(folder / "distill") for folder in (cached, live))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "valid_loss", "gradient_norm"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-3), (name, one["step"])
    first, second = (commands.arrays(folder / "distill") for folder in (cached, live))
    for name in (n for n in first if n.startswith("params")):
        # Adam divides by its own scale: rounding moves a parameter by a small part of the 8 steps of at most 2e-3.
        np.testing.assert_allclose(first[name], second[name], atol=2e-4, err_msg=name)
    one, other = (commands.summary(folder / "distill") for folder in (cached, live))
    assert one["tokens"] == other["tokens"]
    assert one["train_flops"] < other["train_flops"]  # no forward pass of the teacher


@pytest.mark.slow
def test_the_cache_serves_other_batches_and_numbers_of_devices(work, tmp_path):
    copied(work, tmp_path, "prepare_data", "prune", "cache_teacher")
    shape = ("--config.distill.phases.phase1.batch_size=4", "--config.distill.steps=16")
    commands.run(
        "distill", tmp_path, *CACHED[:2], f"--config.distill.cache={work / 'cache_teacher'}", *shape, devices=2
    )
    summary = commands.summary(tmp_path / "distill")
    assert summary["steps"] == 16
    assert summary["valid_loss_end"] < summary["valid_loss_start"]


def test_what_the_cache_s_summary_says(work):
    summary = commands.summary(work / "cache_teacher")
    documented = (commands.ROOT / "docs" / "summary_keys.md").read_text()
    assert all(f"`{name}`" in documented for name in summary)
    assert 0 < summary["tail_mass"] < 1
    assert summary["top_k"] == 20
    reader = distillation.CacheReader(work / "cache_teacher")
    meta = json.loads(next((work / "pretrain" / "checkpoints").glob("*/meta/metadata")).read_text())
    manifest = json.loads((work / "prepare_data" / "corpus" / "manifest.json").read_text())
    assert (reader.header.teacher, reader.header.tokenizer) == (meta["identity"], manifest["tokenizer_hash"])
    assert "finished already" in commands.run("cache_teacher", work)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--config.distill.cache=cache_teacher",), "distill.loss.hidden: a cache holds no hidden states"),
        ((*CACHED, "--config.distill.loss.temperature=2.0"), "distill.loss.temperature: 2.0 is not the cache's, 1.0"),
        ((*CACHED, "--config.distill.loss.top_k=9"), "distill.loss.top_k: 9 is not the cache's, 20"),
        ((*CACHED, "--config.distill.loss.logits_loss=mse"), "distill.loss.logits_loss: mse compares logits"),
        ((*CACHED, "--config.distill.phases.phase1.fim.rate=0.9"), "it lacks"),
        ((*PLAIN, "--config.distill.cache=nowhere"), "nowhere: there is no finished cache here"),
    ],
)
def test_what_does_not_go_with_the_cache_is_one_line(work, arguments, words):
    output = commands.run("distill", work, *arguments, status=2)
    assert words in output
    assert output.splitlines()[-1].startswith("error: ")
    assert not (work / "distill").exists()


def test_a_cache_for_other_data_or_of_another_teacher_is_noticed(work, tmp_path):
    output = commands.run("cache_teacher", work, "--config.distill.phases.phase1.fim.rate=0.2", status=2)
    assert "cache_teacher.data" in output
    copied(work, tmp_path, "prepare_data", "pretrain", "prune", "cache_teacher")
    manifest = tmp_path / "cache_teacher" / "cache" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "teacher": "another"}))
    assert "distill.cache: it is not of the pretrain" in commands.run("distill", tmp_path, *CACHED, status=2)


def files_of(folder):
    return {path.name: path.read_bytes() for path in (folder / "cache_teacher" / "cache").iterdir()}


def test_a_killed_cache_goes_on_to_the_same_bytes(work, tmp_path):
    more = ("--config.distill.steps=40", "--config.cache_teacher.shard_steps=2")
    whole, killed = (copied(work, tmp_path / name, "prepare_data", "pretrain", "prune") for name in ("whole", "killed"))
    commands.run("cache_teacher", whole, *more)
    for number, how in ((3, signal.SIGKILL), (8, signal.SIGTERM)):
        process = commands.start("cache_teacher", killed, *more, stdout=subprocess.DEVNULL)
        shard = killed / "cache_teacher" / "cache" / f"00000-{number:05d}.json"
        while not shard.exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(how)
        assert process.wait(timeout=60) == (0 if how == signal.SIGTERM else -signal.SIGKILL)
        assert not (killed / "cache_teacher" / "summary.json").exists()
    commands.run("cache_teacher", killed, *more)
    left, expected = files_of(killed), files_of(whole)
    assert left.keys() == expected.keys()
    assert all(left[name] == expected[name] for name in expected)
    assert commands.summary(killed / "cache_teacher") == commands.summary(whole / "cache_teacher")


@pytest.mark.slow
def test_a_corrected_teacher_is_pruned_and_teaches(finished, tmp_path):
    copied(finished, tmp_path, "prepare_data", "pretrain")
    stages = "--config.stages=prepare_data,pretrain,correct_teacher,prune,distill"
    commands.run("pipeline", tmp_path, stages, "--config.distill.baseline=False")
    before, after = (commands.summary(tmp_path / name) for name in ("pretrain", "correct_teacher"))
    assert after["valid_loss_start"] == pytest.approx(before["valid_loss_end"], rel=1e-6)
    assert after["valid_loss_end"] < after["valid_loss_start"]
    assert commands.summary(tmp_path / "prune")["valid_loss_before"] == pytest.approx(after["valid_loss_end"], rel=1e-6)
    made = json.loads((tmp_path / "distill" / "stage.json").read_text())
    assert made["stages"]["teacher"] == "correct_teacher"
    meta = json.loads(next((tmp_path / "distill" / "checkpoints").glob("*/meta/metadata")).read_text())
    assert [step["stage"] for step in meta["lineage"]] == ["pretrain", "correct_teacher", "prune", "distill"]
    taken = [sum(c["taken"] for s in meta["loader"]["streams"].values() for c in s["after"].values())]
    first = json.loads(next((tmp_path / "pretrain" / "checkpoints").glob("*/meta/metadata")).read_text())
    assert taken[0] > sum(
        c["taken"] for s in first["loader"]["streams"].values() for c in s["packer"]["parent"]["cursors"]
    )


@pytest.mark.slow
def test_a_mixture_is_taught_by_the_dense_model_it_came_from(finished, tmp_path):
    """An upcycled student: hidden states through the pruning before it, and the balance of its routers."""
    copied(finished, tmp_path, "prepare_data", "pretrain", "prune", "distill", "upcycle")
    (tmp_path / "distill").rename(tmp_path / "first")
    commands.run(
        "distill", tmp_path, f"--config.distill.init_from={tmp_path / 'upcycle'}", "--config.distill.baseline=False"
    )
    summary, records = commands.summary(tmp_path / "distill"), commands.records(tmp_path / "distill")
    assert summary["expert_load_max_over_mean"] >= 1
    assert summary["router_entropy"] > 0
    steps = [record for record in records if "loss" in record]
    assert all(record["hidden_loss"] > 0 and "load_balance_loss" in record for record in steps)
    before = commands.summary(tmp_path / "upcycle")
    assert summary["valid_loss_start"] == pytest.approx(before["valid_loss_moe"], abs=1e-5)


@pytest.mark.slow
def test_a_mixture_is_pruned_and_taught_by_itself(tmp_path):
    config = "tests/experiments/tiny_mixture_config.py"
    commands.run("pipeline", tmp_path, "--config.distill.baseline=False", config=config)
    summary = commands.summary(tmp_path / "distill")
    assert summary["valid_loss_end"] < summary["valid_loss_start"]
    assert {"expert_load_max_over_mean", "router_entropy"} <= summary.keys()
    assert commands.summary(tmp_path / "prune")["experts_after"] == 3
