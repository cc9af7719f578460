"""Training texts of which every claim was run: solutions that pass their tests, and mistakes that do not."""

import dataclasses
import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.synthesis.functions import Task, tasks
from kwaicoder_jax.data.synthesis.mutations import Mutant, mutants

Execute = Callable[
    [Sequence[str]], Sequence[bool]
]  # whether each program runs to its end, contained and in bounded time

_TOGETHER = 64  # programs that are handed over at once
_MISTAKES = 3  # of a task


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is made of each task.

    Attributes:
      mistakes: of each task, at most, for pairs of a mistake and its mending.
      seed: which of the possible ones.
    """

    mistakes: int = _MISTAKES
    seed: int = 0


def verified(
    documents: Iterable[Document], execute: Execute, counts: Counter[str], settings: Settings | None = None
) -> Iterator[Document]:
    """Yields texts made from functions with examples in their docstrings.

    Kinds, in the identifiers: "docstring_to_code", "code_to_docstring" and "mending".

    Args:
      documents: Python.
      execute: runs programs; see `evaluation.Sandbox`.
      counts: raised by one for each "task", what is "trivial" (a function that does nothing passes), "wrong" (the
        solution does not pass), "mistake" (made), "harmless" (a mistake that passes all the same), and each text by kind.
      settings: how many.
    """
    settings = settings or Settings()
    for some in _together(documents):
        passes = execute([program for _, task in some for program in (task.program(), task.program(_stub(task)))])
        right = []
        for (document, task), passed, is_trivial in zip(some, passes[::2], passes[1::2], strict=True):
            counts["task"] += 1
            counts["wrong" if not passed else "trivial" if is_trivial else "right"] += 1
            if passed and not is_trivial:
                right.append((document, task))
        yield from _texts(right, execute, counts, settings)


def _together(documents: Iterable[Document]) -> Iterator[list[tuple[Document, Task]]]:
    some: list[tuple[Document, Task]] = []
    for document in documents:
        some.extend((document, task) for task in tasks(document.text))
        if len(some) >= _TOGETHER:
            yield some
            some = []
    if some:
        yield some


def _stub(task: Task) -> str:
    """The function, without what it does."""
    return f"def {task.name}(*_, **__):\n    return None"


def _texts(
    right: Sequence[tuple[Document, Task]], execute: Execute, counts: Counter[str], settings: Settings
) -> Iterator[Document]:
    chosen = [(document, task, mutant) for document, task in right for mutant in _chosen(document, task, settings)]
    passes = execute([task.program(mutant.text) for _, task, mutant in chosen])
    mistakes: dict[str, list[Mutant]] = {}
    for (document, task, mutant), passed in zip(chosen, passes, strict=True):
        counts["harmless" if passed else "mistake"] += 1
        if not passed:
            mistakes.setdefault(_name(document, task), []).append(mutant)
    for document, task in right:
        name = _name(document, task)
        made = [("docstring_to_code", docstring_to_code(task)), ("code_to_docstring", code_to_docstring(task))]
        made += [(f"mending{number}", mending(task, each)) for number, each in enumerate(mistakes.get(name, []))]
        for kind, text in made:
            counts[kind.rstrip("0123456789")] += 1
            yield dataclasses.replace(
                document, identifier=f"{name}/{kind}", text=text, path="", repository="", scores={}
            )


def _name(document: Document, task: Task) -> str:
    return f"{document.identifier}/{task.name}"


def _chosen(document: Document, task: Task, settings: Settings) -> list[Mutant]:
    """A few mistakes, of different kinds if there are."""
    key = f"{settings.seed}/{document.source}/{_name(document, task)}"
    rng = random.Random(hashlib.sha256(key.encode()).digest())
    every = list(mutants(task.solution))
    rng.shuffle(every)
    kinds: Counter[str] = Counter()
    ranked: list[tuple[int, int, Mutant]] = []
    for each in every:
        ranked.append((kinds[each.kind], len(ranked), each))
        kinds[each.kind] += 1
    return [each for _, _, each in sorted(ranked, key=lambda item: item[:2])[: settings.mistakes]]


def docstring_to_code(task: Task) -> str:
    """The task in words, then the program."""
    words = "\n".join(f"# {line}".rstrip() for line in task.docstring.splitlines())
    return f"# Write the function {task.name}.\n#\n{words}\n\n{_joined(task.context, task.solution)}"


def code_to_docstring(task: Task) -> str:
    """The program, then what it does, and the tests that it passes."""
    tests = "\n".join(task.tests)
    return (
        f"{_joined(task.context, task.solution)}\n# What {task.name} does:\n"
        + "\n".join(f"# {line}".rstrip() for line in task.docstring.splitlines())
        + f"\n\n# It passes:\n{tests}\n"
    )


def mending(task: Task, mutant: Mutant) -> str:
    """A mistake, the tests that it fails, what it is, and the function as it should be."""
    tests = "\n".join(task.tests)
    return (
        f"# This does not pass its tests:\n\n{_joined(task.context, mutant.text)}\n{tests}\n\n"
        f"# Line {mutant.line} of {task.name} has `{mutant.now}` where it should have `{mutant.was}`"
        f" ({mutant.kind}). Mended:\n\n{task.solution}\n"
    )


def _joined(context: str, solution: str) -> str:
    return f"{context}\n\n\n{solution}\n" if context else f"{solution}\n"
