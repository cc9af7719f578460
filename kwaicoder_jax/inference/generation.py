"""Generation for a list of prompts: sorted into few compiled shapes, decoded batch by batch, given back in order.

A batch ends when its longest row does. An engine that refills rows as they stop can stand beside this module, on the
same `prefill` and `choose_tokens`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.decoding import decode
from kwaicoder_jax.models import ModelConfig, Runtime

SMALLEST_BUCKET = 32  # tokens; below it another compiled program costs more than the padding

_decode = jax.jit(decode, static_argnames=("config", "max_new_tokens", "runtime"))


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: tuple[int, ...] = (),
    seed: int = 0,
    batch_size: int = 16,
    max_prompt_tokens: int | None = None,
    truncate: bool = False,
    prompt_ids: Sequence[int] | None = None,
    runtime: Runtime | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    The tokens of a prompt do not depend on the prompts beside it, on their order or on `batch_size`, up to the rounding
    of differently shaped matmuls. One program is compiled per (rows, prompt length rounded up to a power of two,
    max_new_tokens); temperature, top_p and seed compile nothing.

    Args:
      params: as `config` declares them.
      config: the model, dense or a mixture.
      prompts: token ids of each prompt, one or more (begin with the tokenizer's BOS if the model was trained so).
      max_new_tokens: the most tokens to generate per prompt.
      temperature: 0 takes the most probable token (the lowest id among equals); else logits are divided by it.
      top_p: draw among the fewest most probable tokens that sum to this probability.
      stop_tokens: a row ends when it draws one of these.
      seed: token p of a prompt is drawn with randomness from (seed, its prompt id, p).
      batch_size: rows decoded together.
      max_prompt_tokens: the longest prompt to accept; None for no limit.
      truncate: cut longer prompts on the left instead of refusing them.
      prompt_ids: identity of each prompt in the randomness, distinct; its index in `prompts` if None. Pass it to draw
        the same samples from a part of a list.
      runtime: how to compute it.
      progress: called after each batch with (prompts done, prompts in all).

    Returns:
      The new tokens of each prompt, in the order of `prompts`, without the stop token.

    Raises:
      UserError: an empty or too long prompt, a token outside the vocabulary, a setting out of its range.
    """
    _check_settings(max_new_tokens, temperature, top_p, batch_size)
    ids = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
    if len(ids) != len(prompts):
        raise UserError(f"{len(ids)} ids for {len(prompts)} prompts", where="prompt_ids", remedy="give one per prompt")
    accepted = [_accept(i, p, config.vocab_size, max_prompt_tokens, truncate) for i, p in enumerate(prompts)]
    results: list[list[int]] = [[] for _ in accepted]
    done = 0
    for indices, tokens_BT, lengths_B in _batches(accepted, batch_size):
        rows = len(lengths_B)
        ids_B = np.zeros(rows, np.uint32)
        ids_B[: len(indices)] = [ids[i] for i in indices]
        arguments = jax.device_put(
            {
                "tokens_BT": tokens_BT,
                "lengths_B": lengths_B,
                "ids_B": ids_B,
                "seed": np.int32(seed),
                "temperature_B": np.full(rows, temperature, np.float32),
                "top_p_B": np.full(rows, top_p, np.float32),
                "stop_tokens": np.asarray(stop_tokens, np.int32),
            }
        )
        outcome = _decode(params, config, max_new_tokens=max_new_tokens, runtime=runtime or Runtime(), **arguments)
        generated_BT, counts_B = jax.device_get(outcome)
        for row, index in enumerate(indices):
            results[index] = generated_BT[row, : counts_B[row]].tolist()
        done += len(indices)
        if progress is not None:
            progress(done, len(prompts))
    return results


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{value} is too small", where=name, remedy="use 1 or more")
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"{temperature} is not a temperature", where="temperature", remedy="use 0 (greedy) or more")
    if not 0.0 < top_p <= 1.0:
        raise UserError(f"{top_p} is not a probability to reach", where="top_p", remedy="use more than 0, at most 1")


def _accept(index: int, prompt: Sequence[int], vocab_size: int, limit: int | None, truncate: bool) -> np.ndarray:
    """One prompt as int32, checked, and cut on the left where that was asked for."""
    where = f"prompts[{index}]"
    tokens = np.asarray(prompt, np.int64)
    if tokens.ndim != 1 or not tokens.size:
        raise UserError("no tokens to continue", where=where, remedy="begin with the tokenizer's BOS or another token")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if outside.size:
        raise UserError(
            f"token {outside[0]} is outside the vocabulary of {vocab_size}", where=where,
            remedy="encode with the checkpoint's own tokenizer",
        )  # fmt: skip
    if limit is not None and tokens.size > limit:
        if not truncate:
            raise UserError(
                f"{tokens.size} tokens, the limit is {limit}", where=where,
                remedy="raise max_prompt_tokens, or cut on the left with truncate=True",
            )  # fmt: skip
        tokens = tokens[-limit:]
    return tokens.astype(np.int32)


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The compiled size that holds `length`: the next power of two, at least `smallest`."""
    return max(smallest, 1 << (length - 1).bit_length())


def _batches(prompts: list[np.ndarray], batch_size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches of like lengths, longest first (the largest allocation fails early): indices, tokens_BT, lengths_B.

    The last batch is filled up with rows of length 0, so that it does not compile a program of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = min(batch_size, bucket(max(len(prompts), 1), 1))
    for first in range(0, len(order), rows):
        indices = order[first : first + rows]
        time = bucket(len(prompts[indices[0]]))
        tokens_BT, lengths_B = np.zeros((rows, time), np.int32), np.zeros(rows, np.int32)
        for row, index in enumerate(indices):
            lengths_B[row] = len(prompts[index])
            tokens_BT[row, time - lengths_B[row] :] = prompts[index]
        yield indices, tokens_BT, lengths_B
