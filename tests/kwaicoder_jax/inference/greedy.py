"""Greedy answers of the float64 model, which has no cache."""

import numpy as np

from kwaicoder_jax.testing.reference import document_logits


def random_prompts(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, length).tolist() for length in lengths]


def answer(params, config, prompt, count):
    """The most probable token again and again, the whole document anew each time."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(document_logits(params, config, np.asarray(tokens))[-1])))
    return tokens[len(prompt) :]


def is_answer(params, config, prompt, ids):
    """Whether `answer` would give these, in one pass: each is the most probable token after those before it.

    For models whose positions do not depend on a document's length.
    """
    logits_TV = document_logits(params, config, np.asarray([*prompt, *ids], np.int64))
    return ids == np.argmax(logits_TV[len(prompt) - 1 : -1], axis=-1).tolist()
