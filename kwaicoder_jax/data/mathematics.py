"""Generated mathematics with worked answers, each answer checked by running Python that knows nothing of its making."""

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from kwaicoder_jax.data import problems
from kwaicoder_jax.data.sources import Document, Source, fault
from kwaicoder_jax.errors import UserError

_TOOLS: dict[str, Any] = {
    "Fraction": Fraction,
    "gcd": math.gcd,
    "abs": abs,
    "all": all,
    "len": len,
    "max": max,
    "min": min,
    "pow": pow,
    "range": range,
    "sorted": sorted,
    "sum": sum,
}


def holds(check: str) -> bool:
    """Says whether `check`, Python over integers, fractions and a few builtins, is true; an error counts as no."""
    try:
        return eval(check, {"__builtins__": {}, **_TOOLS}) is True
    except Exception:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mathematics(Source):
    """Arithmetic, fractions, equations, divisors, remainders, percentages, sequences, word problems, Python.

    Attributes:
      seed: the same seed gives the same problems.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UserError(f"{self.seed!r} is not a seed", where="prepare_data.sources.*.seed", remedy="use 0 or more")

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one problem a document, named by its kind and number; a wrong answer is counted under "unverified"."""
        taken = number = 0
        while True:
            make = problems.KINDS[number % len(problems.KINDS)]
            problem = make(random.Random(f"{self.seed}/{number}"))
            identifier = f"{make.__name__}/{number}"
            number += 1
            if not (problem.checks and all(map(holds, problem.checks))):
                skipped["unverified"] += 1
                continue
            text = problem.text()
            if reason := fault(text, self.max_document_bytes):
                skipped[reason] += 1
                continue
            taken += len(text.encode())
            if taken > self.max_bytes:
                return
            yield Document(name, identifier, text)
