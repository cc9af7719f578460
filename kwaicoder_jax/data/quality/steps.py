"""Scoring and filtering as steps of the engine: every document gets a score, and the lowest share of each language goes."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax.data.documents import Document, Verdict
from kwaicoder_jax.data.engine import shards
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.data.engine.tally import Tally
from kwaicoder_jax.data.quality.scorer import Scorer

BINS = 1000  # of a histogram of scores from 0 to 1
_DECILES = 10


@dataclasses.dataclass(frozen=True)
class Score:
    """Documents with a score: the probability of a class. Inputs are a shard and a scorer.

    Facts: those of a `Tally` ("out", and "decile N", the N-th tenth of scores from 0 to 1, with examples), and "histograms"
    by language.

    Attributes:
      score: its name among a document's.
      of: the class.
    """

    score: str = "quality"
    of: str = "good"
    name: str = "score"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        scorer = Scorer.decoded(store.read(inputs[1]))
        place, tally, histograms = scorer.classes.index(self.of), Tally(), dict[str, dict[int, int]]()

        def scored() -> Iterator[Document]:
            for documents in shards.batches(shards.read(store.path(inputs[0]))):
                values = scorer.probabilities([document.text.encode() for document in documents])[:, place]
                for document, value in zip(documents, values.tolist(), strict=True):
                    tally.add("out", document)
                    tally.add(f"decile {min(int(value * _DECILES), _DECILES - 1)}", document, example=True)
                    bins = histograms.setdefault(document.language, {})
                    bins[bin_of(value)] = bins.get(bin_of(value), 0) + 1
                    yield dataclasses.replace(document, scores={**document.scores, self.score: round(value, 6)})

        shard = shards.write(store, scored())
        return Result({"shard": shard}, tally.facts() | {"histograms": histograms})


def bin_of(score: float) -> int:
    """Of a histogram."""
    return min(int(score * BINS), BINS - 1)


def added(histograms: Iterable[Mapping[str, Mapping[Any, int]]]) -> dict[str, np.ndarray]:
    """Histograms of several shards as those of one, [BINS] by language."""
    found: dict[str, np.ndarray] = {}
    for each in histograms:
        for language, bins in each.items():
            total = found.setdefault(language, np.zeros(BINS, np.int64))
            for place, count in bins.items():
                total[int(place)] += count
    return found


def thresholds(histograms: Mapping[str, np.ndarray], share: float, least: int = 100) -> dict[str, float]:
    """Below which score about `share` of each language's documents lie, to a bin; 0 where there are fewer than `least`."""
    found = {}
    for language, bins in sorted(histograms.items()):
        wanted, below = math.floor(share * bins.sum()), np.concatenate([[0], np.cumsum(bins)])
        whole = int(np.searchsorted(below, wanted, side="right")) - 1  # never more than the share
        found[language] = whole / BINS if bins.sum() >= least else 0.0
    return found


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """A judge: documents whose score is below their language's threshold break "low_SCORE".

    Attributes:
      score: its name.
      thresholds: by language; 0 for others.
    """

    score: str
    thresholds: Mapping[str, float]

    def __call__(self, document: Document) -> Verdict:
        """See `engine.apply`."""
        low = bin_of(document.scores.get(self.score, 0.0)) / BINS < self.thresholds.get(document.language, 0.0)
        return Verdict(document, (f"low_{self.score}",) if low else ())
