"""Continued pre-training goes on with Adam's moments and the data of the training before."""

import json
import shutil

import numpy as np
import pytest

from tests.experiments import commands

MOMENTS = "--config.upcycle.optimizer_state=True"


@pytest.fixture(scope="module")
def work(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("continued")
    for name in ("prepare_data", "distill"):
        shutil.copytree(finished / name, folder / name)
    commands.run("upcycle", folder, MOMENTS)
    return folder


def test_moments_are_the_student_s_scaled_and_copied(work):
    student = commands.arrays(work / "distill")
    first = commands.arrays(work / "upcycle" / "moments" / "first")
    second = commands.arrays(work / "upcycle" / "moments" / "second")
    mu, nu = ("train['opt_state'][1]['mu']['model']", "train['opt_state'][1]['nu']['model']")
    found = {name for name in student if name.startswith(mu)}
    assert found, sorted(student)[:3]
    for name in (n.removeprefix(mu) for n in found):
        if "['mlp']" not in name:
            np.testing.assert_array_equal(first[f"params{name}"], student[mu + name])
            np.testing.assert_array_equal(second[f"params{name}"], student[nu + name])
    gate = student[f"{mu}['layers']['mlp']['gate']"]  # s = 1, R = 2, G = 4
    shards = np.moveaxis(gate.reshape(*gate.shape[:2], 4, -1), 2, 1) / 2
    np.testing.assert_allclose(first["params['layers']['moe']['gate']"], np.concatenate([shards, shards], 1), rtol=1e-6)
    assert not first["params['layers']['moe']['router']"].any()


def test_training_goes_on_with_them(work, finished):
    more = ["--config.cpt.continue_optimizer=True", "--config.cpt.match_rates=True", "--config.cpt.steps=10"]
    commands.run("cpt", work, MOMENTS, *more)
    state = commands.arrays(work / "cpt")
    count = next(value for name, value in state.items() if name.endswith("[1]['count']"))
    steps = commands.summary(finished / "distill")["steps"]
    assert count == steps + 10
    ours, fresh = (commands.records(place / "cpt") for place in (work, finished))
    assert ours[0] == fresh[0]  # the loss before the first step
    assert ours[1]["loss"] == fresh[1]["loss"]  # the same first batch
    assert ours[3] != fresh[3]


def test_data_goes_on_where_it_ended(finished):
    """Each stage's cursors begin where those of the one before ended: no document is begun twice."""
    taken = []
    for stage in ("pretrain", "distill", "cpt"):
        steps = sorted(int(p.name) for p in (finished / stage / "checkpoints").iterdir() if p.name.isdigit())
        meta = json.loads((finished / stage / "checkpoints" / str(steps[-1]) / "meta" / "metadata").read_text())
        streams = meta["loader"]["streams"]
        taken.append(sum(cursor["taken"] for stream in streams.values() for cursor in stream["after"].values()))
    assert 0 < taken[0] < taken[1] < taken[2]


def test_a_source_without_moments_is_refused(work):
    output = commands.run(
        "upcycle", work, MOMENTS, "--config.upcycle.init_from=distill", "--restart",
        f"--config.upcycle.init_from={work / 'prune'}", status=2,
    )  # fmt: skip
    assert output.startswith("error: upcycle.init_from")
