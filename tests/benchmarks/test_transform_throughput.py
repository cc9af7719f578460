"""The benchmark of streamed upcycling: its row, its memory, and that it leaves nothing behind."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import transform_throughput
from kwaicoder_jax import models

ROOT = pathlib.Path(__file__).parents[2]


def start(folder, *arguments):
    command = [sys.executable, "-m", "benchmarks.transform_throughput", f"--folder={folder / 'disk'}", *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "JAX_PLATFORMS": "cpu"})  # fmt: skip


def run(folder, *arguments):
    with start(folder, f"--json={folder / 'rows.json'}", *arguments) as process:
        output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert not list((folder / "disk").iterdir())
    (row,) = json.loads((folder / "rows.json").read_text())
    assert f"{row['ratio_to_cp']:.2f}" in output
    return row


def test_the_row(tmp_path):
    row = run(tmp_path, "--parameters=1e6", "--rounds=1")
    config = transform_throughput.student_config(1e6)
    experts = models.ExpertsConfig(12, 4, config.mlp_dim // 4)
    assert row["parameters"] == models.count(config)
    assert row["bytes_read"] == pytest.approx(2 * models.count(config), rel=0.01)
    assert row["bytes_written"] == pytest.approx(2 * models.count(config.replace(experts=experts)), rel=0.01)
    assert row["ratio_to_cp"] == pytest.approx(row["cp_seconds"] / row["seconds"], abs=0.01)


def test_four_billion_parameters_become_sixteen_gigabytes():
    config = transform_throughput.student_config(4e9)
    mixture = config.replace(experts=models.ExpertsConfig(12, 4, config.mlp_dim // 4))
    assert models.count(config) == pytest.approx(4e9, rel=0.05)
    assert 2 * models.count(mixture) == pytest.approx(16e9, rel=0.05)


def test_a_signal_leaves_nothing_behind(tmp_path):
    with start(tmp_path, "--parameters=2e7", "--rounds=9") as process:
        while not list((tmp_path / "disk").glob("*/*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 128 + signal.SIGTERM
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.slow
def test_memory_stays_below_a_bound_that_the_models_exceed(tmp_path):
    """1.1e9 parameters: the mixture has 4.2 GB, the largest tensor without layers 0.4 GB."""
    row = run(tmp_path, "--parameters=1e9", "--rounds=1")
    assert row["bytes_written"] > 4e9
    assert row["peak_rss_bytes"] < 2e9
