"""Continued pre-training goes on with Adam's moments and the data of the training before."""

import json
import shutil

import numpy as np
import pytest

from experiments import command, contract, cpt, display, stopping
from kwaicoder_jax import models, training
from kwaicoder_jax.transforms import optimizer_state
from tests.experiments import commands, tiny_config

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


class Begun(Exception):
    """Raised where the first step would be."""


def test_training_begins_with_m_and_v_in_their_places_and_the_rates_of_the_record(work, tmp_path, monkeypatch):
    """The state before the first step of cpt against `optimizer_state.upcycled`, applied to the student's in memory."""
    for name in ("prepare_data", "upcycle"):
        shutil.copytree(work / name, tmp_path / name)
    config = tiny_config.get_config()
    config.upcycle.optimizer_state = config.cpt.continue_optimizer = config.cpt.match_rates = True
    asked = {}

    def begin(loop):
        asked["state"] = loop.initial_state()
        raise Begun

    def make_optimizer(*arguments):
        asked["multipliers"], asked["epsilons"] = arguments[3:]
        return optimizer(*arguments)

    optimizer = training.make_optimizer
    monkeypatch.setattr(training.Loop, "run", begin)
    monkeypatch.setattr(training, "make_optimizer", make_optimizer)
    section, place = contract.Section(command._lists(config.to_dict())), contract.files.path(tmp_path)
    with pytest.raises(Begun):
        contract.run(contract.Context(cpt.STAGE, section, place, display.Display(), stopping.Stop()))

    record = json.loads((work / "upcycle" / "record.json").read_text())
    student = commands.arrays(work / "distill")
    adam = {}
    for moment in ("mu", "nu"):
        prefix = f"train['opt_state'][1]['{moment}']['model']"
        named = {name.removeprefix(prefix): x for name, x in student.items() if name.startswith(prefix)}
        adam[moment] = models.unflatten({name[2:-2].replace("']['", "/"): x for name, x in named.items()})
    dense = models.ModelConfig.from_dict(record["config_before"])
    expected = dict(zip(adam, optimizer_state.upcycled(adam["mu"], adam["nu"], dense, record)))
    state = asked["state"].opt_state[1]
    for moment, tree in expected.items():
        got = models.flatten(getattr(state, moment)["model"])
        assert got.keys() == models.flatten(tree).keys()
        for name, array in models.flatten(tree).items():
            np.testing.assert_allclose(got[name], array, rtol=1e-6, err_msg=f"{moment} {name}")  # float32 products
    assert int(state.count) == commands.summary(work / "distill")["steps"]
    factors = record["factors"]
    assert asked["multipliers"] == factors
    assert asked["epsilons"] == {name: 1 / (s * record["replicas"]) for name, s in factors.items()}


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
