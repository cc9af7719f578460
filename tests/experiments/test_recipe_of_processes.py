"""Several real processes run the recipe: what trains on all their devices, the rest on those of process 0."""

import json
import shutil

import pytest

from kwaicoder_jax import distillation
from tests.experiments import commands, crowd
from tests.experiments.crowd import Crowd, assert_same_bits

WAYS = {"by_two": (2, 1), "by_one": (1, 2)}  # processes, devices of each


def run(workdir, count, devices, *arguments):
    more = ("--join_seconds=60", *arguments)
    started = Crowd("experiments.pipeline", workdir, count, *more, devices=devices, config=commands.TINY)
    assert started.statuses(1500) == [0] * count, started.output()
    return started


def both(tmp_path, *arguments, begun=()):
    """The recipe by two processes of one device, and by one of two; `begun` stages are there already."""
    for name, (count, devices) in WAYS.items():
        for stage in begun:
            shutil.copytree(stage, tmp_path / name / stage.name)
        started = run(tmp_path / name, count, devices, *arguments)
        if count > 1:
            assert "steps" not in started.output(1)  # process 0 alone speaks
    return tmp_path / "by_two", tmp_path / "by_one"


def assert_same_arrays(one, other):
    first, second = crowd.arrays(one), crowd.arrays(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def test_two_processes_prune_and_distil_as_one_does(finished, tmp_path):
    """To the bit: on two devices a sum has one order. Scores of importance only say what is kept."""
    stages = "--config.stages=prepare_data,pretrain,prune,distill"
    steps = ("--config.distill.steps=4", "--config.distill.baseline=False")
    two, one = both(tmp_path, stages, *steps, begun=(finished / "prepare_data", finished / "pretrain"))
    assert_same_arrays(two / "prune", one / "prune")
    assert_same_bits(two / "distill", one / "distill")


@pytest.mark.slow
def test_two_processes_run_the_whole_recipe_as_one_does(tmp_path):
    stages = (
        "prepare_data", "pretrain", "correct_teacher", "prune", "cache_teacher", "distill", "upcycle", "cpt", "export_hf",
        "evaluate", "report",
    )  # fmt: skip
    two, one = both(tmp_path, f"--config.stages={','.join(stages)}")
    for stage in ("pretrain", "correct_teacher", "distill", "distill/baseline", "cpt"):
        assert_same_bits(two / stage, one / stage)
    for stage in ("prune", "upcycle"):
        assert_same_arrays(two / stage, one / stage)
    for stage in stages:
        assert (two / stage / "summary.json").exists()
    samples = [(place / "evaluate" / "samples_house_functions.jsonl").read_text() for place in (two, one)]
    assert samples[0] == samples[1]
    caches = [json.loads((place / "cache_teacher/cache/manifest.json").read_text()) for place in (two, one)]
    assert {shard["file"][:5] for shard in caches[0]["shards"]} == {"00000", "00001"}
    assert caches[0]["tokens"] >= caches[1]["tokens"]  # an example that comes to both processes is stored by each

    learn = (
        "--config.distill.cache=cache_teacher",
        "--config.distill.loss.hidden=False",
        "--config.distill.baseline=False",
    )
    for place, (count, devices) in zip((two, one), WAYS.values()):
        shutil.rmtree(place / "distill")
        run(
            place,
            count,
            devices,
            "--config.stages=prepare_data,pretrain,correct_teacher,prune,cache_teacher,distill",
            *learn,
        )
    assert_same_bits(two / "distill", one / "distill")


@pytest.mark.slow
def test_a_cache_begun_by_two_processes_is_finished_by_two_or_begun_anew_by_one(finished, tmp_path):
    """Shards that only one of them had committed are written again; those of another number of processes are dropped."""
    stages = "--config.stages=prepare_data,pretrain,prune,cache_teacher"
    begun = [finished / name for name in ("prepare_data", "pretrain", "prune")]
    two, one = both(tmp_path, stages, "--config.cache_teacher.shard_steps=2", begun=begun)
    whole = {path.name: path.read_bytes() for path in (two / "cache_teacher" / "cache").iterdir()}
    for name in ("summary.json", "cache/manifest.json", "cache/00001-00003.json", "cache/00001-00002.json"):
        (two / "cache_teacher" / name).unlink()
    shutil.copytree(two, tmp_path / "other")
    run(two, 2, 1, stages, "--config.cache_teacher.shard_steps=2")
    assert {path.name: path.read_bytes() for path in (two / "cache_teacher" / "cache").iterdir()} == whole
    run(tmp_path / "other", 1, 2, stages, "--config.cache_teacher.shard_steps=2")
    for path in (one / "cache_teacher" / "cache").iterdir():
        assert (tmp_path / "other" / "cache_teacher" / "cache" / path.name).read_bytes() == path.read_bytes(), path.name
    assert (
        distillation.CacheReader(tmp_path / "other" / "cache_teacher").identity
        == distillation.CacheReader(one / "cache_teacher").identity
    )
