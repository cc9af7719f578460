"""Fill-in-the-middle without running code: the model sees what stands around part of a line, and is asked for the part.

Two numbers, as in SantaCoder's and CrossCodeEval's single-line infilling: exact match, and edit similarity
1 - levenshtein(a, b) / max(len(a), len(b)), both after trailing white space is dropped.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kwaicoder_jax import errors

COMMENT_STARTS = ("#", "//", "/*", "*", "--")


@dataclass(frozen=True)
class Span:
    """One task; prefix + middle + suffix is a contiguous part of the document.

    Attributes:
      document: index of the document.
      prefix: text before, cut to the window from the left.
      middle: the wanted text, within one line, without its line break.
      suffix: text after, from the line break on, cut to the window.
    """

    document: int
    prefix: str
    middle: str
    suffix: str


@dataclass(frozen=True)
class InfillingScores:
    """Means over spans, each between 0 and 1."""

    count: int
    exact_match: float
    edit_similarity: float


def cut_spans(
    documents: Sequence[str],
    count: int,
    seed: int,
    *,
    whole_line_rate: float = 0.5,
    min_chars: int = 4,
    max_chars: int = 80,
    window: int = 1500,
) -> list[Span]:
    """Draws `count` different spans, as evenly over documents as they allow; equal arguments give equal spans.

    Args:
      documents: source texts.
      count: how many; fewer come back when the documents hold fewer usable lines.
      seed: of the draw.
      whole_line_rate: share of spans that are a line after its indentation; the others start at a word inside it.
      min_chars: shortest middle.
      max_chars: longest middle.
      window: characters kept of prefix and of suffix.

    Raises:
      UserError: no line of any document is usable.
    """
    draw = random.Random(seed)
    lines = {i: found for i, text in enumerate(documents) if (found := _usable_lines(text, min_chars, max_chars))}
    if not lines and count > 0:
        what = f"no code line of {min_chars} to {max_chars} characters in {len(documents)} documents"
        raise errors.UserError(what, where="infilling", remedy="give more validation documents")
    for found in lines.values():
        draw.shuffle(found)
    order = list(lines)
    draw.shuffle(order)
    result: list[Span] = []
    for turn in range(max((len(found) for found in lines.values()), default=0)):
        for document in (document for document in order if turn < len(lines[document])):
            if len(result) == count:
                return result
            start, end = lines[document][turn]
            text = documents[document]
            if draw.random() >= whole_line_rate:
                start = _word_start(text, start, end, min_chars, draw)
            prefix, suffix = text[max(0, start - window) : start], text[end : end + window]
            result.append(Span(document, prefix, text[start:end], suffix))
    return result


def _usable_lines(text: str, min_chars: int, max_chars: int) -> list[tuple[int, int]]:
    """(start after indentation, end before trailing white space) of the lines worth asking for."""
    result, offset, seen = [], 0, set()
    for line in text.split("\n"):
        code = line.strip()
        start = offset + len(line) - len(line.lstrip())
        offset += len(line) + 1
        # a line of brackets is trivial; one that repeats can be copied; one after nothing has no context
        trivial = sum(letter.isalnum() for letter in code) < min_chars or code.startswith(COMMENT_STARTS)
        if min_chars <= len(code) <= max_chars and not trivial and code not in seen and start > 0:
            result.append((start, start + len(code)))
        seen.add(code)
    return result


def _word_start(text: str, start: int, end: int, min_chars: int, draw: random.Random) -> int:
    """A start of a word inside the line that leaves at least `min_chars`; the line's own start when there is none."""
    starts = [i for i in range(start + 1, end - min_chars + 1) if text[i].isalnum() and not text[i - 1].isalnum()]
    return draw.choice(starts) if starts else start


def edit_similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance over the longer length; 1 for two empty texts."""
    if not one and not other:
        return 1.0
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, counterpart in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != counterpart))
    return 1.0 - row[-1] / max(len(one), len(other))


def first_line(completion: str) -> str:
    """What counts of a completion: its text up to the first line break."""
    return completion.partition("\n")[0]


def score(spans: Sequence[Span], completions: Sequence[str]) -> InfillingScores:
    """Compares completions with the middles, the first line of each, without trailing white space.

    Raises:
      UserError: no span, or another number of completions.
    """
    if not spans or len(spans) != len(completions):
        raise errors.UserError(f"{len(completions)} completions for {len(spans)} spans", where="infilling")
    pairs = [(span.middle.rstrip(), first_line(text).rstrip()) for span, text in zip(spans, completions, strict=True)]
    exact = sum(wanted == given for wanted, given in pairs) / len(pairs)
    # a completion far longer than the middle is as wrong at any length; the cap bounds the quadratic comparison
    similar = sum(edit_similarity(wanted, given[: 4 * len(wanted) + 100]) for wanted, given in pairs) / len(pairs)
    return InfillingScores(len(pairs), exact, similar)


def evaluate(spans: Sequence[Span], generate: Callable[[list[tuple[str, str]]], list[str]]) -> InfillingScores:
    """Asks `generate` for the middles of all (prefix, suffix) pairs, and scores them."""
    return score(spans, generate([(span.prefix, span.suffix) for span in spans]))
