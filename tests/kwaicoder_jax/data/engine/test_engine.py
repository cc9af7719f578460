"""The store, tasks and runners: done once, whole or not at all, and the same bytes wherever it is done."""

import importlib.metadata
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import shards, steps
from kwaicoder_jax.data.engine.runners import Beam, InProcess, Processes, chosen, run
from kwaicoder_jax.data.engine.steps import Task, settings_of
from kwaicoder_jax.data.engine.store import Result, Store, action_of
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.data.engine.toy import Shout

RUNNERS = [InProcess(), Processes(2), Beam()]  # processes are used again by the next test
TEXTS = [b"one", b"two", b"three", b""]


def tasks(store, step=Shout(), texts=TEXTS):  # noqa: B008
    return [Task(step, (store.add(text),), text.decode()) for text in texts]


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda each: type(each).__name__)
def test_every_runner_writes_the_same_bytes(tmp_path, runner):
    store, expected = Store(tmp_path / "a"), Store(tmp_path / "b")
    seen = []
    results = run(store, tasks(store), runner, lambda *progress: seen.append(progress))
    assert [store.read(each.outputs["text"]) for each in results] == [b"ONE!", b"TWO!", b"THREE!", b"!"]
    assert seen[-1] == ("shout", 4, 4)
    run(expected, tasks(expected), InProcess())
    assert tree(store.root) == tree(expected.root)


@pytest.mark.parametrize("runner", RUNNERS, ids=lambda each: type(each).__name__)
def test_errors_are_told_after_the_other_tasks_are_done(tmp_path, runner):
    store = Store(tmp_path)
    with pytest.raises(UserError, match="1 of 5 tasks of shout failed: a text: is bad"):
        run(store, tasks(store, texts=[b"bad", *TEXTS]), runner)
    assert all(store.find(task.action) for task in tasks(store))
    with pytest.raises(RuntimeError, match=r"2 of 2 tasks(?s:.*)RuntimeError: is worse"):  # a defect before bad input
        run(store, tasks(store, texts=[b"bad", b"worse"]), runner)


def test_what_was_done_is_not_done_again(tmp_path):
    log = tmp_path / "log"
    store, step = Store(tmp_path / "store"), Shout(log=str(log))
    run(store, tasks(store, step), InProcess())
    run(store, tasks(store, step, [b"two", b"four", b"one"]), InProcess())
    assert log.read_text().split("\n") == ["one", "two", "three", "", "four", ""]
    run(store, tasks(store, Shout("?", str(log)), [b"one"]), InProcess())
    assert log.read_text().endswith("four\none\n"), "settings count"


def test_a_changed_input_that_is_made_the_same_changes_nothing_behind(tmp_path):
    log = tmp_path / "log"
    store = Store(tmp_path / "store")
    for text in (b"Two", b"tWo"):
        (first,) = run(store, tasks(store, Shout(), [text]), InProcess())
        run(store, [Task(Shout("?", str(log)), (first.outputs["text"],))], InProcess())
    assert log.read_text() == "TWO!\n"


def test_a_lost_object_is_made_again(tmp_path):
    store = Store(tmp_path)
    (result,) = run(store, tasks(store, texts=[b"one"]), InProcess())
    store.path(result.outputs["text"]).unlink()
    with pytest.raises(UserError, match="an object is missing"):
        store.read(result.outputs["text"])
    (again,) = run(store, tasks(store, texts=[b"one"]), InProcess())
    assert again == result
    assert store.read(result.outputs["text"]) == b"ONE!"


def test_an_error_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    seen = []

    def fail():
        with store.writing() as (output, names):
            seen.append(names)
            output.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert seen == [[]]
    assert tree(tmp_path) == {}


def test_a_worker_that_dies_is_one_line_and_others_start(tmp_path):
    store, processes = Store(tmp_path), Processes(1)
    with pytest.raises(UserError, match="a worker was killed"):
        run(store, tasks(store, texts=[b"deadly", b"one"]), processes)
    (result,) = run(store, tasks(store, texts=[b"one"]), processes)
    processes.close()
    assert store.read(result.outputs["text"]) == b"ONE!"


_RUN = """
import sys
from kwaicoder_jax.data.engine.runners import Processes, run
from kwaicoder_jax.data.engine.store import Store
from tests.kwaicoder_jax.data.engine.test_engine import tasks
from tests.kwaicoder_jax.data.engine.toy import Shout
if __name__ == "__main__":
    store = Store(sys.argv[1])
    run(store, tasks(store, Shout(log=sys.argv[2], pause=0.3), [b"%d" % each for each in range(20)]), Processes(2))
"""


def test_killed_and_run_again(tmp_path):
    """The parent is killed: its workers end, and what they had done is not done again."""
    (tmp_path / "main.py").write_text(_RUN)
    log, root = tmp_path / "log", pathlib.Path(__file__).parents[4]
    command = [sys.executable, str(tmp_path / "main.py"), str(tmp_path / "a"), str(log)]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    started = subprocess.Popen(command, env=environment, start_new_session=True)
    while not log.exists() or len(log.read_text().split()) < 4:
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    time.sleep(1.0)
    first = log.read_text().split()
    time.sleep(1.0)
    assert log.read_text().split() == first, "workers went on"
    subprocess.run(command, env=environment, check=True)
    both = log.read_text().split()
    assert len(first) < 20
    assert sorted(set(both), key=int) == [str(each) for each in range(20)]
    assert len(both) <= 20 + 2, "but for what the two workers were at"
    other = Store(tmp_path / "b")
    run(other, tasks(other, Shout(), [b"%d" % each for each in range(20)]), InProcess())
    here = {name: content for name, content in tree(tmp_path / "a").items() if not name.endswith(".tmp")}
    assert here == tree(other.root)


def test_settings_are_plain_values_and_places_do_not_count():
    assert settings_of(Shout("?", "log")) == {"": "Shout", "mark": "?", "name": "shout"}
    assert settings_of({"a": {3, 1}, "b": (1.5, None)}) == {"a": [1, 3], "b": [1.5, None]}
    assert action_of("a", {"x": 1, "y": 2}) == action_of("a", {"y": 2, "x": 1}) != action_of("a", {"x": 1})


def test_other_code_and_other_libraries_are_other_actions(monkeypatch):
    task = Task(Shout(), ("0" * 40,))
    before = task.action
    steps.code.cache_clear()
    assert task.action == before

    class Grammar:
        name, version = "tree-sitter-new", "1.0"

    installed = list(importlib.metadata.distributions())
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [*installed, Grammar])
    steps.code.cache_clear()
    assert task.action != before
    Grammar.name = "something-else"
    steps.code.cache_clear()
    assert task.action == before
    monkeypatch.setattr(pathlib.Path, "read_bytes", lambda path: b"changed")
    steps.code.cache_clear()
    assert task.action != before
    monkeypatch.undo()
    steps.code.cache_clear()


def test_names_of_engines():
    assert chosen("local", 0) == InProcess()
    processes = chosen("local", 3)
    assert isinstance(processes, Processes)
    assert processes.workers == 3
    assert chosen("beam", 0, ["--runner=DirectRunner"]) == Beam(("--runner=DirectRunner",))
    for name, workers, what in (("ray", 0, "'ray' is no engine; local or beam"), ("local", -1, "-1 is negative")):
        with pytest.raises(UserError, match=what):
            chosen(name, workers)


def test_options_that_beam_refuses(tmp_path):
    with pytest.raises(UserError, match=r"prepare_data.engine.options: Apache Beam refuses"):
        run(Store(tmp_path), tasks(Store(tmp_path)), Beam(("--runner=Nope",)))


def test_without_beam_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match="Apache Beam is not installed; pip install apache-beam"):
        run(Store(tmp_path), tasks(Store(tmp_path)), Beam())


def test_documents_come_back_and_damage_is_told(tmp_path):
    store = Store(tmp_path)
    documents = [
        Document("code", "a/b.py", "x = '\u2028 \\n'\n", "b.py", "a", "python", "MIT", {"quality": 0.5}),
        Document("code", "empty", ""),
        *(Document("code", str(number), "y" * number) for number in range(3000)),
    ]
    name = shards.write(store, documents)
    assert list(shards.read(store.path(name))) == documents
    assert shards.write(store, documents) == name
    whole = store.read(name)
    for damaged in (whole[: len(whole) // 2], whole[:50] + b"xxxx" + whole[54:], b"no zstd"):
        broken = store.add(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            list(shards.read(store.path(broken)))


def test_results_are_written_after_their_outputs(tmp_path):
    store = Store(tmp_path)
    store.record("abcd", Result({"text": "0" * 40}, {}))
    assert store.find("abcd") is None
    assert multiprocessing.get_start_method(allow_none=True) != "spawn", "the runner asks for it, it does not set it"
