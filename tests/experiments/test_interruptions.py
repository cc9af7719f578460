"""Real processes, really killed: the same command again ends in the same bits."""

import json
import random
import signal
import subprocess
import time

import pytest

from tests.experiments import commands


def interrupt(workdir, seconds: float, how: int) -> int | None:
    """Starts the pipeline, sends the signal after `seconds`; None if it had ended by then, else its exit status."""
    process = commands.start("pipeline", workdir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
        return None
    except subprocess.TimeoutExpired:
        process.send_signal(how)
        return process.wait(timeout=120)


def interrupt_often(workdir, times: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(times):
        how = signal.SIGTERM if number % 3 == 2 else signal.SIGKILL
        status = interrupt(workdir, rng.uniform(2.0, 10.0), how)
        if status is None:
            return
        assert status == (0 if how == signal.SIGTERM else -signal.SIGKILL)


def test_killed_at_random_moments_the_recipe_ends_in_the_same_bits(finished, tmp_path):
    interrupt_often(tmp_path / "work", times=4, seed=int(time.time()) % 1000)
    commands.run("pipeline", tmp_path / "work")
    commands.assert_same_run(finished, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_killed_many_times_the_recipe_ends_in_the_same_bits(finished, tmp_path, seed):
    interrupt_often(tmp_path / "work", times=12, seed=seed)
    commands.run("pipeline", tmp_path / "work")
    commands.assert_same_run(finished, tmp_path / "work")


def wait_for_step(folder, step: int, process) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        file = folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()[0]}")


def copy_stage(finished, workdir, *names: str) -> None:
    import shutil

    for name in names:
        shutil.copytree(finished / name, workdir / name)


def test_sigterm_in_training_saves_the_step_and_exits_0(finished, tmp_path):
    copy_stage(finished, tmp_path, "prepare_data")
    arguments = (
        "--config.pretrain.steps=4000",
        "--config.pretrain.save_every=4000",
        "--config.pretrain.eval_every=4000",
    )
    process = commands.start("pretrain", tmp_path, *arguments)
    wait_for_step(tmp_path / "pretrain", 3, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "goes on from here" in output
    saved = [int(path.name) for path in (tmp_path / "pretrain" / "checkpoints").iterdir() if path.name.isdigit()]
    assert saved
    assert saved[0] >= 3
    last = json.loads((tmp_path / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == saved[0]


@pytest.mark.slow
def test_preempt_exit_code(finished, tmp_path):
    copy_stage(finished, tmp_path, "prepare_data")
    process = commands.start("pretrain", tmp_path, "--config.pretrain.steps=4000", "--preempt_exit_code=75")
    wait_for_step(tmp_path / "pretrain", 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


def test_two_processes_do_not_share_a_stage(finished, tmp_path):
    copy_stage(finished, tmp_path, "prepare_data")
    process = commands.start("pretrain", tmp_path, "--config.pretrain.steps=4000")
    wait_for_step(tmp_path / "pretrain", 1, process)
    output = commands.run("pretrain", tmp_path, "--config.pretrain.steps=4000", status=2)
    process.kill()
    process.wait()
    assert "another process" in output
