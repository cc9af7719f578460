"""Streamed stages leave the checkpoint that the stages in memory leave, bit for bit, and say what they did not check."""

import shutil

import numpy as np
import pytest

from tests.experiments import commands


@pytest.fixture
def work(finished, tmp_path):
    for name in ("prepare_data", "pretrain", "distill"):
        shutil.copytree(finished / name, tmp_path / name)
    return tmp_path


def assert_same_arrays(one, other):
    first, second = commands.arrays(one), commands.arrays(other)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_upcycle(work, finished):
    output = commands.run("upcycle", work, "--config.upcycle.streamed=True")
    assert "MB" in output
    assert_same_arrays(work / "upcycle", finished / "upcycle")
    mine, theirs = commands.summary(work / "upcycle"), commands.summary(finished / "upcycle")
    assert mine.pop("config_hash") != theirs.pop("config_hash")
    assert mine == theirs
    assert mine["verified"]
    output = commands.run(
        "upcycle", work, "--config.upcycle.streamed=True", "--config.upcycle.verify=False", "--restart"
    )
    assert "not compared with the dense model" in output
    assert_same_arrays(work / "upcycle", finished / "upcycle")
    summary = commands.summary(work / "upcycle")
    assert summary.keys() == {"params_total", "params_active", "lossless", "verified", "stage", "config_hash"}
    assert not summary["verified"]


def test_prune(work, finished):
    scores = f"--config.prune.scores={finished / 'prune' / 'scores.npz'}"
    output = commands.run("prune", work, "--config.prune.streamed=True", "--config.prune.verify=False", scores)
    assert "not compared with the model before" in output
    assert_same_arrays(work / "prune", finished / "prune")
    theirs = commands.summary(finished / "prune")
    for key in ("params_before", "params_after", "calibration_tokens"):
        assert commands.summary(work / "prune")[key] == theirs[key]
    assert "valid_loss_after" not in commands.summary(work / "prune")
    commands.run("prune", work, "--config.prune.streamed=True", "--restart")
    assert_same_arrays(work / "prune", finished / "prune")
    mine = commands.summary(work / "prune")
    assert {**mine, "config_hash": None} == {**theirs, "config_hash": None}
