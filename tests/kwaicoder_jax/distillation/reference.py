"""Losses between logits in float64 numpy, vocabulary last, each written down from its definition; and finite differences."""

import numpy as np

SKEW = 0.3


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def of_distributions(form, p, q, skew=SKEW):
    """A divergence of two distributions over the last axis; every probability is above 0."""
    middle = (p + q) / 2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: kl(p, middle) / 2 + kl(q, middle) / 2,
        "skewed_kl": lambda: kl(p, skew * p + (1 - skew) * q),
    }[form]()


def of_logits(form, student, teacher, temperature=1.0, skew=SKEW):
    """The loss [...] of logits [..., V], at a temperature."""
    student, teacher = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if form == "mse":
        return ((student - teacher) ** 2).mean(-1)
    if form == "cosine":
        lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
        return 1 - (student * teacher).sum(-1) / lengths
    p, q = np.exp(log_softmax(teacher / temperature)), np.exp(log_softmax(student / temperature))
    return temperature**2 * of_distributions(form, p, q, skew)


def bucketed(logits, ids, temperature=1.0):
    """Probabilities of the tokens `ids` [..., K] and of all others together, [..., K + 1]."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    chosen = np.take_along_axis(p, ids, -1)
    return np.concatenate([chosen, 1 - chosen.sum(-1, keepdims=True)], -1)


def of_buckets(form, student, teacher, count, temperature=1.0, skew=SKEW):
    """The loss over the teacher's `count` likeliest tokens and the rest as one class."""
    ids = np.argsort(-np.asarray(teacher, np.float64), -1, kind="stable")[..., :count]
    p, q = bucketed(teacher, ids, temperature), bucketed(student, ids, temperature)
    return temperature**2 * of_distributions(form, p, q, skew)


def gradient(function, x, step=1e-5):
    """Central differences of a scalar function by every element of float64 x."""
    x = np.asarray(x, np.float64)
    result = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            sides.append(function(moved))
        result[place] = (sides[0] - sides[1]) / (2 * step)
    return result
