"""The stage: what it depends on, what it writes, and what it says about the machine."""

import pathlib

import pytest

from experiments import contract, report
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError

STAGES = ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate", "report")


def context(workdir: pathlib.Path, title: str = "A title") -> contract.Context:
    config = {"stages": STAGES, "seed": 0, "report": {"title": title}}
    return contract.Context(report.STAGE, config, files.path(workdir), Display(), Stop())


def test_writes_the_page_and_the_summary(workdir):
    summary = contract.run(context(workdir))
    page = (workdir / "report.html").read_text()
    assert summary["report_bytes"] == len(page.encode())
    assert files.read_json(workdir / "report/summary.json") == summary
    assert not [place for place in workdir.iterdir() if place.name.startswith(".report")]
    assert contract.run(context(workdir)) == summary  # finished: not made again


def test_its_inputs_are_the_finished_stages(workdir):
    contract.run(context(workdir))
    record = files.read_json(workdir / "report/stage.json")
    assert record["inputs"] == {name: f"id{number}" for number, name in enumerate(STAGES[:-1])}
    changed = files.read_json(workdir / "cpt/stage.json") | {"identity": "another"}
    files.write_json(workdir / "cpt/stage.json", changed)
    with pytest.raises(UserError, match=r"report\.cpt: its input cpt is not the one it was made from.*--restart"):
        contract.run(context(workdir))
    with pytest.raises(UserError, match=r"report\.title"):
        contract.run(context(workdir, title="Another"))


def test_unfinished_stages_are_left_out(workdir):
    (workdir / "evaluate/summary.json").unlink()
    contract.run(context(workdir))
    assert "evaluate" not in files.read_json(workdir / "report/stage.json")["inputs"]
    assert "pass@1" not in (workdir / "report.html").read_text()


def test_the_command_says_nothing_about_the_machine():
    here = pathlib.Path.cwd() / "configs/demo.py"
    argv = ["x", f"--config={here}", "--workdir=/some/where/runs/demo", "--config.seed=3", "--restart", "--verbosity=1",
            "--config.report.title=a b"]  # fmt: skip
    assert report.command(argv) == (
        "python -m experiments.pipeline --config=configs/demo.py --workdir=demo --config.seed=3 "
        "'--config.report.title=a b'"
    )
    assert report.command(["x", "--config=/else/where/c.py"]).endswith("--config=c.py")
