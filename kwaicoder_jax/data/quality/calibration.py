"""How far probabilities can be believed, and how they are mended: one temperature (Guo et al. 2017, arXiv 1706.04599)."""

import dataclasses

import numpy as np

from kwaicoder_jax.data.quality.scorer import Scorer

_BINS = 15


def calibrated(scorer: Scorer, logits_TC: np.ndarray, labels_TC: np.ndarray) -> tuple[Scorer, float]:
    """The scorer with all logits divided by the temperature whose cross-entropy on held-out texts is least; and that.

    Args:
      scorer: trained on others.
      logits_TC: its logits of the held-out texts.
      labels_TC: their labels.
    """
    low, high = np.log(0.02), np.log(50.0)
    for _ in range(60):  # golden section: the cross-entropy is convex in 1 / temperature, so it has one minimum
        left, right = low + 0.382 * (high - low), low + 0.618 * (high - low)
        if cross_entropy(logits_TC / np.exp(left), labels_TC) < cross_entropy(logits_TC / np.exp(right), labels_TC):
            high = right
        else:
            low = left
    temperature = float(np.exp((low + high) / 2))
    weight, bias = (each / np.float32(temperature) for each in (scorer.weight_BC, scorer.bias_C))
    return dataclasses.replace(scorer, weight_BC=weight, bias_C=bias), temperature


def cross_entropy(logits_TC: np.ndarray, labels_TC: np.ndarray) -> float:
    """In nats a text."""
    logits = np.asarray(logits_TC, np.float64)
    highest = logits.max(1, keepdims=True)
    log = logits - highest - np.log(np.exp(logits - highest).sum(1, keepdims=True))
    return float(-(labels_TC * log).sum() / len(labels_TC))


def measures(probability_TC: np.ndarray, labels_TC: np.ndarray) -> dict[str, float]:
    """Of held-out texts: "accuracy" and "calibration_error" of the likeliest class; with two classes "auc" of the second.

    The calibration error is the mean over texts of |confidence - accuracy| of their bin of confidence (ECE, 15 bins).
    """
    right = probability_TC.argmax(1) == labels_TC.argmax(1)
    confidence = probability_TC.max(1)
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = [abs(confidence[place == each].sum() - right[place == each].sum()) for each in range(_BINS)]
    found = {"accuracy": float(right.mean()), "calibration_error": float(sum(gaps) / len(right))}
    if probability_TC.shape[1] == 2:
        found["auc"] = area(probability_TC[:, 1], labels_TC[:, 1] > 0.5)
    return found


def area(score_T: np.ndarray, is_positive_T: np.ndarray) -> float:
    """Under the ROC curve: how often a positive text has a higher score than another one; ties count half."""
    order, count = np.argsort(score_T, kind="stable"), int(is_positive_T.sum())
    _, inverse, counts = np.unique(score_T[order], return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]  # the mean rank of equals
    if not 0 < count < len(score_T):
        return float("nan")
    total = rank[is_positive_T[order]].sum() - count * (count + 1) / 2
    return float(total / (count * (len(score_T) - count)))
