"""Scoring with known completions, and the house's own benchmark with the sandbox."""

import json

import pytest

from kwaicoder_jax import errors
from kwaicoder_jax.evaluation import benchmarks, house_functions, outcomes, sandbox


@pytest.fixture(scope="module")
def box():
    return sandbox.Sandbox(outcomes.Limits(cpu_seconds=2.0))


class Small:
    """Two sound tasks and one whose reference is wrong."""

    name = "small"

    def tasks(self):
        return (
            benchmarks.Task("one", "def f():\n", "    return 1\n", "assert f() == 1"),
            benchmarks.Task("two", "def f():\n", "    return 2\n", "assert f() == 2"),
            benchmarks.Task("bad", "def f():\n", "    return 4\n", "assert f() == 3"),
        )

    def program(self, task, completion):
        return f"{task.prompt}{completion}\n{task.tests}"


def test_score(box):
    completions = {
        "one": ["    return 1\n\nprint(f())\nraise ValueError", "    return 2\n"],
        "two": ["    return 2\ndef g(", "    return 2\n"],
        "bad": ["    return 5\n", "    return 6\n"],
    }
    scores = benchmarks.score(Small(), completions, box, ks=(1, 2), workers=2)
    assert list(scores.reference_failures) == ["bad"]
    assert "AssertionError" in scores.reference_failures["bad"]
    assert scores.counts == {"one": (2, 1), "two": (2, 2), "bad": (2, 0)}
    assert scores.pass_at_k[1].mean == pytest.approx(1.5 / 3)
    assert scores.pass_at_k[2].mean == pytest.approx(2 / 3)
    assert scores.pass_at_k_sound[1].mean == pytest.approx(1.5 / 2)
    assert scores.summary() == {
        "small_pass_at_1": pytest.approx(0.5),
        "small_pass_at_2": pytest.approx(2 / 3),
        "small_tasks": 3,
        "small_reference_failures": 1,
    }


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ({}, "no completions"),
        ({"three": ["x"]}, "unknown task 'three'"),
        ({"one": ["x"]}, "pass@2"),
        ({"one": []}, "has 0"),
    ],
)
def test_score_refuses(completions, message):
    with pytest.raises(errors.UserError, match=message):
        benchmarks.score(Small(), completions, None, ks=(1, 2))


def test_sample_asks_for_every_prompt():
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [f"    return {i}\nprint(" for i in range(len(prompts))]

    found = benchmarks.sample(Small(), generate, num_samples=2)
    assert asked == ["def f():\n"] * 6
    assert found["two"] == ["    return 2", "    return 3"]
    with pytest.raises(errors.UserError, match="0 completions for 3"):
        benchmarks.sample(Small(), lambda _: [])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a\n", "a\n"),
        ("", ""),
        ("  x\ndef g():\nclass A", "  x"),
        ("  x\nclass A\ndef g", "  x"),
        ("  default = 1\n  print(1)\n  if __name__", "  default = 1\n  print(1)\n  if __name__"),
        ("\ndef g", ""),
        ("def g", "def g"),
    ],
)
def test_truncate(text, wanted):
    assert benchmarks.truncate(text, benchmarks.TOP_LEVEL_STOPS) == wanted


def test_samples_file(tmp_path):
    samples = {"b": ["x\u2028y\n", "é\t"], "a": [""]}
    benchmarks.write_samples(tmp_path / "samples.jsonl", samples)
    lines = (tmp_path / "samples.jsonl").read_text().split("\n")
    assert json.loads(lines[0]) == {"task_id": "b", "completion": "x\u2028y\n"}
    assert len(lines) == 4
    assert benchmarks.read_samples(tmp_path / "samples.jsonl") == samples
    with pytest.raises(errors.UserError, match="no file of samples"):
        benchmarks.read_samples(tmp_path / "other.jsonl")
    for text in ("{", "[]", '{"task_id": "a"}', '{"task_id": "a", "completion": 3}'):
        (tmp_path / "bad.jsonl").write_text('{"task_id": "a", "completion": ""}\n' + text)
        with pytest.raises(errors.UserError, match=r"bad.jsonl:2"):
            benchmarks.read_samples(tmp_path / "bad.jsonl")


def test_outcomes_file(box, tmp_path):
    completions = {"two": ["    return 2\ndef g(", "    return 3\n"], "one": ["    return 1\n"]}
    scores = benchmarks.score(Small(), completions, box, workers=2)
    benchmarks.write_outcomes(tmp_path / "outcomes.jsonl", Small(), completions, scores.outcomes)
    rows = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert [(row["task_id"], row["status"]) for row in rows] == [
        ("two", "passed"),
        ("two", "failed"),
        ("one", "passed"),
    ]
    assert rows[0]["prompt"] == "def f():\n"
    assert rows[0]["completion"] == "    return 2"  # as it was run
    assert "AssertionError" in rows[1]["detail"]
    assert all(set(row) == {"task_id", "prompt", "completion", "status", "detail"} for row in rows)


def test_house_functions_are_sound(box):
    house = house_functions.HouseFunctions()
    tasks = house.tasks()
    assert len(tasks) == len({task.task_id for task in tasks}) == 24
    assert benchmarks.reference_failures(house, box) == {}
    for wrong in ("", "    pass\n", "        pass\n"):
        found = box.run_many([house.program(task, wrong) for task in tasks])
        assert {outcome.status for outcome in found} == {"failed"}, wrong


def test_house_solutions_survive_their_stops():
    for task in house_functions.HouseFunctions().tasks():
        assert benchmarks.truncate(task.canonical_solution, task.stops) == task.canonical_solution
        assert not task.prompt.endswith(" "), "a trailing space splits most tokenizers' words"
        assert all(line.rstrip() == line for line in task.prompt.split("\n"))
