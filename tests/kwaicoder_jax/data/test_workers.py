"""Loaders in processes of their own: the batches and positions of one loader, and what happens when one ends."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from kwaicoder_jax import data
from kwaicoder_jax.data import workers
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.data.test_loader import PHASES, loader, same


def of_workers(corpus, count=2, **more):
    return data.WorkerLoader(corpus, PHASES, seed=5, streams=4, workers=count, **more)


def test_batches_and_positions_are_those_of_one_loader(corpus):
    alone, shared = loader(corpus), of_workers(corpus)
    assert shared.steps == alone.steps
    for batch in alone:
        same(next(shared), batch)
        assert shared.step == alone.step
        assert json.dumps(shared.get_state()) == json.dumps(alone.get_state())
    with pytest.raises(StopIteration):
        next(shared)


def test_positions_are_exchanged_with_other_numbers_and_processes(corpus):
    batches = list(loader(corpus))
    first = of_workers(corpus, 4)
    for _ in range(6):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    halves = [of_workers(corpus, 2, process_index=index, process_count=2) for index in range(2)]
    for index, half in enumerate(halves):
        half.set_state(state)
        batch = next(half)
        for key, value in batches[6].items():
            rows = len(value) // 2
            assert (batch[key] == value[index * rows : (index + 1) * rows]).all()
    merged = data.merge_states([half.get_state() for half in halves])
    for half in halves:
        half.close()
    alone = loader(corpus)
    alone.set_state(merged)
    same(next(alone), batches[7])


def test_a_run_goes_on_from_another(corpus):
    ended, alone, shared = loader(corpus), loader(corpus), of_workers(corpus)
    for _ in ended:
        pass
    alone.go_on_from(ended.get_state())
    shared.go_on_from(ended.get_state())
    same(next(shared), next(alone))
    shared.close()


def test_a_worker_that_ends_is_an_error(corpus):
    shared = of_workers(corpus)
    next(shared)
    shared._processes[1].kill()
    with pytest.raises(UserError, match="a worker of the loader ended, with status -9"):
        list(shared)
    assert not shared._processes


def test_what_a_worker_raises_is_raised(corpus, tmp_path):
    shared = of_workers(corpus)
    shared._arguments["path"] = tmp_path  # no corpus there
    with pytest.raises(UserError, match="there is no corpus here"):
        next(shared)


def test_workers_end_with_their_parent_and_not_by_sigterm(corpus):
    command = [sys.executable, "-c", workers._COMMAND]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    start = {
        "path": corpus.path, "phases": tuple(PHASES), "seed": 5, "streams": 4, "process_index": 0, "process_count": 1,
        "position": loader(corpus).get_state(),
    }  # fmt: skip
    pickle.dump(start, worker.stdin)
    worker.stdin.flush()
    pickle.load(worker.stdout)
    worker.send_signal(signal.SIGTERM)
    pickle.load(worker.stdout)
    assert worker.poll() is None
    worker.stdout.close()  # as if this process had ended
    began = time.monotonic()
    while worker.poll() is None and time.monotonic() - began < 60:
        time.sleep(0.05)
    assert worker.poll() == 0
    worker.stdin.close()


@pytest.mark.parametrize(("count", "processes"), [(0, 1), (3, 1), (2, 4)])
def test_numbers_that_do_not_divide_the_streams(corpus, count, processes):
    with pytest.raises(UserError, match=r"loader\.workers"):
        of_workers(corpus, count, process_count=processes)


def test_a_worker_leaves_the_accelerator_alone(corpus):
    shared = of_workers(corpus, 1)
    next(shared)
    environment = f"/proc/{shared._processes[0].pid}/environ"
    if os.path.exists(environment):
        with open(environment, "rb") as file:
            assert b"JAX_PLATFORMS=cpu" in file.read().split(b"\0")
    shared.close()
