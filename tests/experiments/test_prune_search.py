"""The search as a part of the prune stage: what it leaves, and that a kill at any moment changes nothing."""

import csv
import json
import shutil
import signal
import time
import xml.etree.ElementTree

import numpy as np
import pytest

from kwaicoder_jax import checkpoints, models
from tests.experiments import commands

SEARCH = (
    "--config.prune.search.max_params=30000", "--config.prune.search.distill_top=1",
    "--config.prune.search.distill_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def searched(finished, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("search")
    for name in ("prepare_data", "pretrain"):
        shutil.copytree(finished / name, workdir / name)
    output = commands.run("prune", workdir, *SEARCH)
    return workdir, output


def test_the_student_is_the_winner_and_inside_the_budget(searched):
    workdir, output = searched
    rows = [json.loads(line) for line in (workdir / "prune" / "search.jsonl").read_text().splitlines()]
    summary = commands.summary(workdir / "prune")
    assert len(rows) == summary["search_measured"] == 4
    assert all(row["params"] <= 30_000 < summary["params_before"] for row in rows)
    best = min(rows, key=lambda row: row["kl"])
    assert best["distilled_loss"] is not None  # the only one that was distilled
    assert summary["search_kl"] == best["kl"]
    assert summary["search_distilled"] == 1
    config = models.ModelConfig.from_dict(checkpoints.read_meta(workdir / "prune")["model"])
    for name, size in best["sizes"].items():
        assert getattr(config, name) == summary[f"{name}_after"] == size
    assert models.count(config) == summary["params_after"] == best["params"]
    assert config.mlp_dim % 4 == 0
    assert f"{summary['search_shapes']} shapes inside the budget, 4 measured" in output
    assert output.count(" parameters  KL ") == 4


def test_the_table_and_the_plot_hold_every_row(searched):
    folder = searched[0] / "prune"
    rows = list(csv.DictReader((folder / "search.csv").read_text().splitlines()))
    kls = [json.loads(line)["kl"] for line in (folder / "search.jsonl").read_text().splitlines()]
    assert [float(row["kl"]) for row in rows] == kls
    drawing = xml.etree.ElementTree.parse(folder / "search.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(drawing.findall(".//{*}circle")) == len(rows)
    page = (folder / "report.html").read_text()
    assert page.count("<tr>") == len(rows) + 1
    assert "chosen" in page


def test_search_keys_are_documented(searched):
    documented = (commands.ROOT / "docs" / "summary_keys.md").read_text()
    for key in commands.summary(searched[0] / "prune"):
        assert f"`{key}`" in documented, key


@pytest.mark.slow
def test_killed_on_the_way_it_ends_in_the_same_result(searched, tmp_path):
    workdir, _ = searched
    for name in ("prepare_data", "pretrain"):
        shutil.copytree(workdir / name, tmp_path / name)
    place = tmp_path / "prune" / "search.jsonl"
    for lines, how in ((1, signal.SIGKILL), (2, signal.SIGTERM)):
        process = commands.start("prune", tmp_path, *SEARCH)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if place.exists() and place.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        process.send_signal(how)
        output, _ = process.communicate(timeout=100)
        assert process.returncode == (0 if how == signal.SIGTERM else -how), output
        assert not (tmp_path / "prune" / "summary.json").exists()
    before = place.stat().st_mtime_ns
    commands.run("prune", tmp_path, *SEARCH)
    assert place.stat().st_mtime_ns > before  # it went on, and did not only read
    for name in ("search.jsonl", "search.csv", "search.svg", "report.html"):
        assert (tmp_path / "prune" / name).read_text() == (workdir / "prune" / name).read_text(), name
    assert commands.summary(tmp_path / "prune") == commands.summary(workdir / "prune")
    first, second = commands.arrays(workdir / "prune"), commands.arrays(tmp_path / "prune")
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_bad_budgets_are_one_line_and_leave_nothing(finished, tmp_path):
    for name in ("prepare_data", "pretrain"):
        shutil.copytree(finished / name, tmp_path / name)
    for argument, words in (
        ("--config.prune.search.max_latency=1e-3", "prune.search.chip: a latency needs a chip"),
        ("--config.prune.search.max_params=5", "least params of any"),
        ("--config.prune.target.experts=3", "prune.target.experts: the model has no experts"),
    ):
        output = commands.run("prune", tmp_path, argument, status=2)
        assert output.startswith("error: ")
        assert output.count("\n") == 1, output
        assert words in output
        assert not (tmp_path / "prune" / "checkpoints").exists()
        shutil.rmtree(tmp_path / "prune", ignore_errors=True)
