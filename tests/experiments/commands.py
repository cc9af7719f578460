"""Runs stage commands as a user does: in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
TINY = "tests/experiments/tiny_config.py"
RUN_KEYS = (  # of a run, not of its result
    "started_at", "git_commit", "seconds", "peak_rss_bytes", "tokens_per_second", "tokens_per_second_per_chip", "mfu",
    "seconds_total", "seconds_lost_to_restarts", "restarts", "seconds_input", "seconds_saving", "seconds_compiling",
    "seconds_restoring", "seconds_evaluating", "seconds_rolling_back", "goodput",
)  # fmt: skip


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TOKENIZERS_PARALLELISM": "false", **more}


def start(stage: str, workdir: Any, *arguments: str, devices: int = 1, config: str = TINY, **popen: Any):
    command = [sys.executable, "-m", f"experiments.{stage}", f"--config={config}", f"--workdir={workdir}", *arguments]
    popen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **popen}
    return subprocess.Popen(command, cwd=ROOT, env=environment(devices), **popen)


def run(stage: str, workdir: Any, *arguments: str, status: int = 0, timeout: float = 500, **options: Any) -> str:
    """Runs to the end, asserts the exit status, returns what was printed."""
    process = start(stage, workdir, *arguments, **options)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == status, output
    return output


def records(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in RUN_KEYS} for line in lines]


def summary(folder: pathlib.Path) -> dict[str, Any]:
    return {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k not in RUN_KEYS}


def arrays(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, parameters and training state, as it lies on disk."""
    import jax
    import orbax.checkpoint as ocp

    steps = sorted((int(p.name), p) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())
    found = {}
    for item in ("params", "train"):
        if (steps[-1][1] / item).exists():
            tree = ocp.StandardCheckpointer().restore((steps[-1][1] / item).absolute())
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Both work folders hold the same results, to the bit."""
    for stage in ("pretrain", "prune", "distill", "distill/baseline", "upcycle", "cpt"):
        first, second = arrays(one / stage), arrays(other / stage)
        assert first.keys() == second.keys(), stage
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{stage} {name}")
        if (one / stage / "metrics.jsonl").exists():
            assert records(one / stage) == records(other / stage), stage
    for stage in ("prepare_data", "pretrain", "prune", "distill", "upcycle", "cpt", "evaluate"):
        assert summary(one / stage) == summary(other / stage), stage
    for name in (
        "evaluate/infilling.jsonl",
        "evaluate/samples_house_functions.jsonl",
        "prepare_data/corpus/manifest.json",
    ):
        assert (one / name).read_text() == (other / name).read_text(), name
