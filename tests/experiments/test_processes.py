"""Several real processes train one run, and are killed, stopped, hung: it ends as if nothing had been."""

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from kwaicoder_jax import checkpoints
from tests.experiments import commands, crowd
from tests.experiments.crowd import Crowd, assert_same_bits

STAGE = "tests.experiments.toy_stage"
QUICK = ("--peer_seconds=12", "--join_seconds=60")  # the machine may be busy


def run(workdir, count, *arguments, devices=1, module=STAGE, **more):
    started = Crowd(module, workdir, count, *QUICK, *arguments, devices=devices, **more)
    assert started.statuses(500) == [0] * count, started.output()
    return started


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The toy, undisturbed, by two processes of one device each."""
    workdir = tmp_path_factory.mktemp("whole")
    started = run(workdir, 2)
    assert "step" not in started.output(1)  # process 0 alone speaks
    return workdir / "toy"


def test_one_process_writes_what_there_is_one_of(whole):
    lines = [line["step"] for line in commands.records(whole) if "loss" in line]
    assert lines == list(range(1, 41))
    assert json.loads((whole / "summary.json").read_text())["steps"] == 40
    assert checkpoints.read_meta(whole)["guard"]["skipped"] == 1


def kill_often(
    workdir, count, times, rng, whole=None, *, longest=7.0, shortest=1.0, stage="toy", arguments=(), **options
):
    """Kills one or all of the processes at random moments, until that hit all of them at work so many times.

    A run that ends before is compared with `whole`, and begun anew; the next is waited for less long. What was done is
    printed: `pytest -rP` shows it.
    """
    hits, again, number = 0, [], 0
    options = {"module": STAGE, **options}
    while hits < times:
        number += 1
        assert number <= 5 * times, f"{hits} of {number} kills met all processes at work"
        started = Crowd(options["module"], workdir, count, *QUICK, *arguments, **options.get("more", {}))
        time.sleep(rng.uniform(shortest, longest))
        victims = range(count) if number % 2 else [rng.randrange(count)]
        finished = workdir / stage / "summary.json"
        at_work = all(process.poll() is None for process in started.processes) and not finished.exists()
        started.kill(*victims)
        reached = crowd.last_step(workdir / stage)
        statuses = started.statuses(200)  # the others do not hang
        if not finished.exists():
            hits += at_work
            again.append(max(0, reached - crowd.saved_step(workdir / stage)))
            assert all(status != 0 for status in statuses), (statuses, started.output())
        else:
            if whole is not None:
                assert_same_bits(workdir / stage, whole)
            shutil.rmtree(workdir / stage)
        if not at_work:
            longest = max(shortest + 1, 0.8 * longest)
    print(f"{number} kills of {count} processes, {hits} of them at work; steps to do again: {again}")


def hung(workdir):
    """Process 1 gets no batch after its 11th; it is named, and all end."""
    started = Crowd(STAGE, workdir, 2, *QUICK, "--watchdog_seconds=15", TOY_FAULT="hang:1:11")
    assert started.statuses(200) == [3, 3], started.output()
    assert f"no step ended within 15 s: process 1 of 2 on {socket.gethostname()}" in started.output(0)
    assert "in input after step 10" in started.output(0)
    assert "process 0" not in started.output(0)
    assert 'tests/experiments/toy_stage.py", line' in started.output(1)  # where it was
    assert checkpoints.newest_step(workdir / "toy") == 10


def test_hung_stopped_and_killed_they_end_in_the_same_bits(whole, tmp_path):
    """One run after the other in one folder: each goes on from what the one before left."""
    hung(tmp_path)
    stopped(tmp_path, 2, 17)
    kill_often(tmp_path, 2, 5, random.Random(int(time.time()) % 1000), whole, longest=5.0)
    run(tmp_path, 2)
    assert_same_bits(tmp_path / "toy", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_many_times_four_processes_end_in_the_same_bits(tmp_path, seed):
    run(tmp_path / "whole", 4)
    more = {"TOY_SLOW": "0.2"}
    whole = tmp_path / "whole" / "toy"
    kill_often(tmp_path / "work", 4, 10, random.Random(seed), whole, shortest=3.0, longest=30.0, more=more)
    run(tmp_path / "work", 4)
    assert_same_bits(tmp_path / "work" / "toy", tmp_path / "whole" / "toy")


def stopped(workdir, count, step, **options):
    """Process 1 is asked to stop after a step; the description of what all of them saved then."""
    started = Crowd(STAGE, workdir, count, *QUICK, "--preempt_exit_code=75", TOY_SLOW="0.1", **options)
    started.wait_for(workdir / "toy", step)
    started.processes[1].send_signal(signal.SIGTERM)
    assert started.statuses() == [75] * count, started.output()
    meta = checkpoints.read_meta(workdir / "toy")
    assert step <= meta["progress"]["step"] < 40
    assert commands.records(workdir / "toy")[-1]["step"] == meta["progress"]["step"]
    assert meta["loader"] == {"number": meta["progress"]["step"]}


def wait_for_signs(started, folder, phase, count):
    """Until all processes linger in a phase."""
    deadline = time.monotonic() + 200
    while not all((folder / f"{phase}.{number}").exists() for number in range(count)):
        assert time.monotonic() < deadline, started.output()
        assert all(process.poll() is None for process in started.processes), started.output()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stop_is_heard_in_every_phase_by_one_or_all_and_nothing_is_lost(whole, tmp_path):
    """All stop together, with what they had done saved, or with nothing to save; one run goes on from stop to stop."""
    done = 0
    for phase, victims, status in (
        ("compile", [0, 1], 0), ("evaluate", [1], 0), ("step", [0, 1], 75), ("save", [0], 75), ("evaluate", [0, 1], 75),
        ("step", [1], 0), ("save", [0, 1], 0),
    ):  # fmt: skip
        signs = tmp_path / f"{phase}.{len(victims)}"
        signs.mkdir()
        more = {"TOY_FAULT": "compile:1"} if phase == "compile" else {"TOY_LINGER": f"{phase}:2"}
        started = Crowd(STAGE, tmp_path, 2, *QUICK, f"--preempt_exit_code={status}", TOY_SIGNS=str(signs), **more)
        if phase == "compile":
            started.wait_for_file(tmp_path / "toy" / "metrics.jsonl")
            time.sleep(3.0)
        else:
            wait_for_signs(started, signs, phase, 2)
        began = time.monotonic()
        for number in victims:
            started.processes[number].send_signal(signal.SIGTERM)
        assert started.statuses(200) == [status, status], (phase, victims, started.output())
        saved = crowd.saved_step(tmp_path / "toy")
        print(f"SIGTERM to {victims} in {phase}: {time.monotonic() - began:.1f} s; step {saved} is saved, {done} was")
        assert phase != "compile" or time.monotonic() - began < 60  # the compiler never returns
        assert saved == crowd.last_step(tmp_path / "toy")  # no step that was done is done again
        done = saved
    assert 0 < done < 40
    run(tmp_path, 2)
    assert_same_bits(tmp_path / "toy", whole)


@pytest.mark.slow
def test_the_others_wait_while_process_0_works_alone_and_all_hear_of_a_stop_and_of_a_loss(tmp_path):
    """Where process 0 is killed, JAX's own abort of the others may come before ours."""

    def start(name, seconds):
        (tmp_path / name).mkdir()
        more = {"TOY_LINGER": f"alone:{seconds}", "TOY_SIGNS": str(tmp_path / name)}
        started = Crowd(STAGE, tmp_path / "work", 3, *QUICK, "--preempt_exit_code=75", **more)
        wait_for_signs(started, tmp_path / name, "alone", 1)
        time.sleep(3.0)  # the others come to where they wait
        return started

    for name, victims, how, statuses in (
        ("lost", [0], signal.SIGKILL, [-9, 3, 3]), ("peer", [2], signal.SIGKILL, [3, 3, -9]),
        ("asked", [0], signal.SIGTERM, [75] * 3), ("peer_asked", [1], signal.SIGTERM, [75] * 3),
        ("all_asked", [0, 1, 2], signal.SIGTERM, [75] * 3),
    ):  # fmt: skip
        started = start(name, 300)
        began = time.monotonic()
        for number in victims:
            started.processes[number].send_signal(how)
        found = started.statuses(100)
        assert [3 if status == -signal.SIGABRT else status for status in found] == statuses, (
            name,
            found,
            started.output(),
        )
        print(f"{name}: all ended after {time.monotonic() - began:.1f} s")
    started = start("end", 5)  # longer than a question to the service takes
    assert started.statuses(200) == [0, 0, 0], started.output()
    assert not (tmp_path / "end" / "alone.1").exists()
    assert json.loads((tmp_path / "work" / "toy" / "summary.json").read_text())["process"] == 0
    assert crowd.arrays(tmp_path / "work" / "toy")["train/b"].tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_frozen_is_named_and_the_other_ends(whole, tmp_path, number):
    """SIGSTOP, as of a host that hangs: its threads say nothing any more, and its sockets stay open."""
    started = Crowd(STAGE, tmp_path, 2, *QUICK, TOY_SLOW="0.1")
    started.wait_for(tmp_path / "toy", 12)
    started.processes[number].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    other = started.processes[1 - number]
    try:
        assert other.wait(100) == 3, started.output()
        print(f"process {number} frozen: the other one ended after {time.monotonic() - began:.1f} s")
    finally:
        started.processes[number].send_signal(signal.SIGCONT)
    assert started.statuses(100)[number] != 0
    named = f"process {number} of 2" if number else "process 0 does not answer"
    assert named in started.output(1 - number)
    run(tmp_path, 2)
    assert_same_bits(tmp_path / "toy", whole)


@pytest.mark.slow
def test_two_processes_go_on_for_four_and_one_for_two(whole, tmp_path):
    """On another layout to rounding: float32 sums in another order. The order of the data stays."""
    stopped(tmp_path, 4, 7)
    stopped(tmp_path, 2, 17, devices=2)
    run(tmp_path, 1, devices=2)
    first, second = crowd.arrays(tmp_path / "toy"), crowd.arrays(whole)
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=1e-5, atol=1e-6, err_msg=name)
    losses = [
        [line["loss"] for line in commands.records(place) if line.get("loss")] for place in (tmp_path / "toy", whole)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)  # each step saw the same rows


@pytest.mark.slow
def test_a_jump_of_the_loss_rolls_all_processes_back_and_kills_do_not_matter(tmp_path):
    arguments = ["--config=tests/experiments/toy_spike_config.py"]
    run(tmp_path / "whole", 2, *arguments)
    assert checkpoints.read_meta(tmp_path / "whole" / "toy")["guard"]["windows"] == [[21, 23]]
    kill_often(tmp_path / "work", 2, 4, random.Random(3), arguments=arguments, shortest=3.0, longest=9.0)
    run(tmp_path / "work", 2, *arguments)
    assert_same_bits(tmp_path / "work" / "toy", tmp_path / "whole" / "toy")


@pytest.mark.slow
def test_the_mixture_by_four_processes_is_killed_and_goes_on_with_two(finished, tmp_path):
    """The real stage: bits on the same layout, losses to rounding on another, the same order of the data."""
    for place in ("whole", "work"):
        for name in ("prepare_data", "upcycle"):
            shutil.copytree(finished / name, tmp_path / place / name)
    arguments = ["--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.cpt.steps=20"]
    options = {"module": "experiments.cpt", "config": commands.TINY}
    run(tmp_path / "whole", 4, *arguments, **options)
    kill_often(tmp_path / "work", 4, 3, random.Random(1), shortest=15.0, longest=60.0, stage="cpt", module="experiments.cpt",
               arguments=arguments, more={"config": commands.TINY})  # fmt: skip
    shutil.copytree(tmp_path / "work", tmp_path / "other")
    run(tmp_path / "work", 4, *arguments, **options)
    assert_same_bits(tmp_path / "work" / "cpt", tmp_path / "whole" / "cpt")
    run(tmp_path / "other", 2, *arguments, devices=2, **options)
    records = [commands.records(tmp_path / place / "cpt") for place in ("other", "whole")]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in records]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    loaders = [checkpoints.read_meta(tmp_path / place / "cpt")["loader"] for place in ("other", "whole")]
    assert loaders[0] == loaders[1]


FULL = """
set -e
mount -t tmpfs -o size=20m none "$1"
shift
"$@" & pid=$!
until [ -d "$WORK/toy/checkpoints/10" ]; do sleep 0.02; kill -0 $pid; done
head -c 100m /dev/zero > "$WORK/filler" || true
wait $pid && status=0 || status=$?
echo "status $status, $(ls "$WORK/toy/checkpoints" | tr '\\n' ' ')"
rm "$WORK/filler"
"$@"
cp -r "$WORK/toy" "$KEEP"
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path):
    """A small disk of its own, which fills up while steps are saved."""
    if subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("nothing may be mounted here")
    run(tmp_path / "whole", 1, devices=2)
    (tmp_path / "disk").mkdir()
    more = {"WORK": str(tmp_path / "disk"), "KEEP": str(tmp_path / "kept"), "TOY_SLOW": "0.05"}
    command = [sys.executable, "-m", STAGE, f"--config={crowd.TOY}", f"--workdir={tmp_path / 'disk'}"]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", FULL, "sh", str(tmp_path / "disk"), *command],
        cwd=commands.ROOT, env=crowd.quick(2, **more), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device; choose a place that can be written" in errors[0]
    assert "Traceback" not in done.stderr
    status, folders = done.stdout.split(",")[:2]
    assert status.strip() == "status 2"
    assert any(folder.isdigit() for folder in folders.split())
    assert_same_bits(tmp_path / "kept", tmp_path / "whole" / "toy")
