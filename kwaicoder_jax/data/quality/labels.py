"""Labelled texts, from anybody: a file of rows, and a scorer that is learned from it and judged on what it did not see."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kwaicoder_jax.data.quality.calibration import calibrated, measures
from kwaicoder_jax.data.quality.features import features
from kwaicoder_jax.data.quality.scorer import Scorer, train
from kwaicoder_jax.errors import UserError

_FEWEST = 20  # texts; fewer tell nothing
_HELD_OUT = 0.2


class Labelled(NamedTuple):
    """Texts with labels.

    Attributes:
      texts: UTF-8.
      labels: share of each class, float32 [texts, classes].
      classes: names.
    """

    texts: list[bytes]
    labels: np.ndarray
    classes: tuple[str, ...]


def read(path: Path) -> Labelled:
    """Reads rows of "text" and "label": a number from 0 (bad) to 1 (good) in every row, or the name of a class.

    Raises:
      UserError: no such file, a row that is none, labels of both kinds, or fewer than two classes or twenty texts.
    """
    texts, found = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text, label = _row(line, f"{path}:{number}")
                texts.append(text)
                found.append(label)
    except OSError as error:
        raise UserError(f"cannot be read ({error})", where=f"prepare_data.quality.labels: {path}") from error
    if len(texts) < _FEWEST:
        raise UserError(f"has {len(texts)} texts", where=str(path), remedy=f"label {_FEWEST} at least")
    return Labelled(texts, *_shares(found, str(path)))


def _row(line: bytes, where: str) -> tuple[bytes, str | float]:
    try:
        row = json.loads(line)
        text, label = row["text"], row["label"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"is no row ({error!r})", where=where, remedy='use {"text": ..., "label": ...}') from None
    is_score = isinstance(label, int | float) and not isinstance(label, bool) and 0 <= label <= 1
    if not isinstance(text, str) or not (is_score or isinstance(label, str)):
        raise UserError(f"label {label!r} is neither a number from 0 to 1 nor a name", where=where)
    return text.encode(errors="replace"), label


def _shares(found: Sequence[str | float], where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if len({isinstance(label, str) for label in found}) > 1:
        raise UserError("has numbers and names for labels", where=where, remedy="use one of them")
    if not isinstance(found[0], str):
        good = np.array(found, np.float32)
        return np.stack([1 - good, good], axis=1), ("bad", "good")
    classes = sorted({str(label) for label in found})
    if len(classes) < 2:
        raise UserError(f"has one class, {classes[0]!r}", where=where, remedy="label texts of another one")
    return np.eye(len(classes), dtype=np.float32)[[classes.index(str(label)) for label in found]], tuple(classes)


def fit(labelled: Labelled, **how: Any) -> tuple[Scorer, dict[str, float]]:
    """A scorer that is trained on four fifths, and calibrated and measured on the rest, which equal texts never share.

    Args:
      labelled: texts with labels.
      **how: see `scorer.train`.

    Returns:
      It, and "texts", "held_out", "temperature", and `calibration.measures` of the held-out texts.

    Raises:
      UserError: all texts are equal, or almost.
    """
    held = np.array([_is_held_out(text) for text in labelled.texts])
    if held.all() or not held.any():
        raise UserError("texts are too few or too much alike to hold some out", where="prepare_data.quality.labels")
    learned = [text for text, out in zip(labelled.texts, held, strict=True) if not out]
    scorer = train(learned, labelled.labels[~held], labelled.classes, **how)
    judged, truth = [text for text, out in zip(labelled.texts, held, strict=True) if out], labelled.labels[held]
    scorer, temperature = calibrated(scorer, scorer.logits(features(judged, len(scorer.weight_BC))), truth)
    counts = {"texts": float(len(held)), "held_out": float(held.sum()), "temperature": temperature}
    return scorer, counts | measures(scorer.probabilities(judged), truth)


def _is_held_out(text: bytes) -> bool:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < _HELD_OUT * 2**64
