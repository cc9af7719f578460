"""The contract where several processes run one stage, or wait for one; threads stand for processes."""

import threading
import time

import pytest

from experiments import contract, pipeline, stopping
from experiments.display import Display
from experiments.watching import Watch
from kwaicoder_jax import files
from kwaicoder_jax.errors import UserError
from tests.experiments.made_peers import crowd


class Run:
    """What the processes of one run did: (process, config x) by call."""

    def __init__(self, tmp_path, count=3, *, together):
        self.calls, self.peers = [], crowd(count)
        self.tmp_path, self.together, self.results = tmp_path, together, {}

    def start(self, number, x=1, **options):
        """Process `number` runs the stage, in a thread; its result or error is in `results`."""

        def work(context):
            self.calls.append(context.watch.peers.index)
            time.sleep(0.2)
            return {"answer": 42}

        stage = contract.Stage("one", work, together=self.together)
        config = {"seed": 0, "stages": ("one",), "one": {"x": x}}
        watch = Watch()
        watch.peers = self.peers[number]
        context = contract.Context(stage, config, files.path(self.tmp_path), Display(), stopping.Stop(), watch)

        def target():
            try:
                self.results[number] = contract.run(context, **options)
            except UserError as error:
                self.results[number] = error

        thread = threading.Thread(target=target, daemon=True)
        thread.start()
        return thread


@pytest.mark.parametrize(("together", "workers"), [(True, [0, 1, 2]), (False, [0])])
def test_all_processes_do_the_work_or_the_first_one_alone(tmp_path, together, workers):
    run = Run(tmp_path, together=together)
    followers = [run.start(number) for number in (1, 2)]
    time.sleep(0.3)
    assert not run.calls  # until the first one has begun
    leader = run.start(0)
    for thread in (leader, *followers):
        thread.join(20)
    assert sorted(run.calls) == workers
    assert run.results[1] == run.results[2] == files.read_json(tmp_path / "one" / "summary.json")
    assert run.results[0]["answer"] == 42


@pytest.mark.parametrize("together", [True, False])
def test_a_finished_stage_is_passed_by_all(tmp_path, together):
    for _ in range(2):
        run = Run(tmp_path, together=together)
        for thread in [run.start(number) for number in range(3)]:
            thread.join(20)
        assert [run.results[number]["answer"] for number in range(3)] == [42] * 3
    assert not run.calls


def test_a_process_with_another_config_is_named(tmp_path):
    run = Run(tmp_path, 2, together=True)
    for thread in [run.start(0), run.start(1, x=2)]:
        thread.join(20)
    assert str(run.results[1]).startswith("one: process 1 has another config or other inputs than process 0; start all")


def test_a_recipe_that_differs_is_noticed_before_anybody_waits():
    leader, other = crowd(2)
    pipeline.agree(leader, {"stages": ("a", "b")})
    pipeline.agree(other, {"stages": ("a", "b")})
    with pytest.raises(UserError, match="--config: process 1 has another config than process 0"):
        pipeline.agree(other, {"stages": ("b", "a")})
