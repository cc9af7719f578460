"""The whole recipe in processes: what it leaves, what it refuses to do twice, and what it does with changes."""

import json
import resource
import shutil

import pytest

from tests.experiments import commands


def test_the_recipe_leaves_what_the_contract_says(finished):
    for stage in ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate", "report"):
        summary = json.loads((finished / stage / "summary.json").read_text())
        common = {"stage", "config_hash", "git_commit", "started_at", "seconds", "peak_rss_bytes"}
        assert common <= summary.keys(), stage
    assert (finished / "report.html").stat().st_size > 10_000


def test_upcycling_in_the_recipe_is_lossless(finished):
    summary = commands.summary(finished / "upcycle")
    assert summary["max_relative_logit_error"] <= 1e-5
    assert abs(summary["valid_loss_moe"] - summary["valid_loss_dense"]) <= 1e-5
    assert commands.summary(finished / "cpt")["valid_loss_start"] == pytest.approx(
        summary["valid_loss_dense"], abs=1e-5
    )


def test_summary_keys_are_documented(finished):
    documented = (commands.ROOT / "docs" / "summary_keys.md").read_text()
    for stage in ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate", "report"):
        for key in commands.summary(finished / stage):
            general = key.replace("standard_library", "SOURCE").replace("mathematics", "SOURCE")
            general = general.replace("house_functions", "BENCHMARK")
            assert f"`{general}`" in documented, (stage, general)


def test_a_second_run_does_nothing_and_says_so(finished):
    def processor_seconds() -> float:  # not the clock's: other tests run beside this one
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    began = processor_seconds()
    output = commands.run("pipeline", finished)
    assert output.count("finished already") == 8
    assert processor_seconds() - began < 30


def test_a_moved_work_folder_is_still_finished(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "elsewhere")
    assert commands.run("pipeline", tmp_path / "elsewhere").count("finished already") == 8


def test_a_changed_field_is_named_and_makes_the_rest_stale(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    change = "--config.prune.target.mlp_dim=40"
    output = commands.run("prune", workdir, change, status=2)
    assert "prune.target.mlp_dim" in output
    assert "was 32, is now 40" in output
    assert output.count("\n") == 1
    commands.run("prune", workdir, change, "--restart")
    output = commands.run("distill", workdir, change, status=2)
    assert "distill.init_from" in output
    assert "input" in output
    assert "its input prune is not" in output
    assert json.loads((workdir / "distill" / "summary.json").read_text())  # nothing was overwritten
    page = (workdir / "report.html").read_text()
    assert "distill was made from another prune" in commands.run("report", workdir, "--restart", status=2)
    assert (workdir / "report.html").read_text() == page  # and no page that mixes two recipes


@pytest.mark.slow
def test_what_follows_a_changed_stage_is_made_again(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    change = "--config.prune.target.mlp_dim=40"
    commands.run("prune", workdir, change, "--restart")
    commands.run("pipeline", workdir, change, "--restart_from=distill")
    assert commands.summary(workdir / "upcycle")["max_relative_logit_error"] <= 1e-5


@pytest.mark.slow
def test_the_mesh_may_change_between_stages(finished, tmp_path):
    workdir = tmp_path / "work"
    shutil.copytree(finished, workdir)
    output = commands.run("cpt", workdir, "--restart", devices=4)
    assert "done" in output
    one, four = commands.records(finished / "cpt"), commands.records(workdir / "cpt")
    assert four[0]["valid_loss"] == pytest.approx(one[0]["valid_loss"], rel=1e-5)
