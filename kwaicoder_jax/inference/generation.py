"""Generation for a list of prompts in one call, on an engine that is made for it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.engine import Engine
from kwaicoder_jax.inference.programs import Placement
from kwaicoder_jax.inference.requests import Request
from kwaicoder_jax.inference.sizes import bucket
from kwaicoder_jax.inference.weights import Form, prepare
from kwaicoder_jax.models import ModelConfig, Runtime


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_tokens: tuple[int, ...] = (),
    seed: int = 0,
    batch_size: int = 16,
    max_prompt_tokens: int | None = None,
    truncate: bool = False,
    prompt_ids: Sequence[int] | None = None,
    form: Form | str = Form.FLOAT,
    runtime: Runtime | None = None,
    placement: Placement | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    The tokens of a prompt do not depend on the prompts beside it, on their order or on `batch_size`, up to the rounding
    of differently shaped matmuls.

    Args:
      params: as `config` declares them.
      config: the model, dense or a mixture.
      prompts: token ids of each prompt, one or more (begin with the tokenizer's BOS if the model was trained so).
      max_new_tokens: the most tokens to generate per prompt.
      temperature: see Request, like the next two.
      top_k: as there.
      top_p: as there.
      stop_tokens: a row ends when it draws one of these.
      seed: token p of a prompt is drawn with randomness from (seed, its prompt id, p).
      batch_size: rows decoded together.
      max_prompt_tokens: the longest prompt to accept; None for no limit.
      truncate: cut longer prompts on the left instead of refusing them.
      prompt_ids: identity of each prompt in the randomness, distinct; its index in `prompts` if None. Pass it to draw
        the same samples from a part of a list.
      form: how weights are stored, see `weights.Form`.
      runtime: how to compute it.
      placement: where `params` are on a mesh; None for one device.
      progress: called with (prompts done, prompts in all) after each step in which some ended.

    Returns:
      The new tokens of each prompt, in the order of `prompts`, without the stop token.

    Raises:
      UserError: an empty or too long prompt, a token outside the vocabulary, a setting out of its range.
    """
    ids = list(range(len(prompts))) if prompt_ids is None else list(prompt_ids)
    if len(ids) != len(prompts):
        raise UserError(f"{len(ids)} ids for {len(prompts)} prompts", where="prompt_ids", remedy="give one per prompt")
    if max_new_tokens < 1:
        raise UserError(f"{max_new_tokens} is too small", where="max_new_tokens", remedy="use 1 or more")
    if batch_size < 1:
        raise UserError(f"{batch_size} is too small", where="batch_size", remedy="use 1 or more")
    accepted = [_accept(i, prompt, max_prompt_tokens, truncate) for i, prompt in enumerate(prompts)]
    if not accepted:
        return []
    engine = Engine(
        prepare(params, config, form),
        config,
        max_rows=min(batch_size, bucket(len(accepted))),
        max_tokens=max(map(len, accepted)) + max_new_tokens,
        fixed_rows=True,
        runtime=runtime,
        placement=placement,
    )
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_tokens": frozenset(stop_tokens),
    }
    generations = [
        engine.submit(Request(prompt, max_new_tokens, seed=seed, sample=ids[i], **settings), where=f"prompts[{i}]")
        for i, prompt in enumerate(accepted)
    ]
    before = 0
    while engine.step():
        done = sum(generation.reason is not None for generation in generations)
        if progress is not None and done > before:
            progress(done, len(generations))
        before = done
    return [generation.ids for generation in generations]


def _accept(index: int, prompt: Sequence[int], limit: int | None, truncate: bool) -> tuple[int, ...]:
    """One prompt, cut on the left where that was asked for."""
    tokens = tuple(np.asarray(prompt, np.int64).tolist())
    if limit is not None and len(tokens) > limit:
        if not truncate:
            raise UserError(
                f"{len(tokens)} tokens, the limit is {limit}", where=f"prompts[{index}]",
                remedy="raise max_prompt_tokens, or cut on the left with truncate=True",
            )  # fmt: skip
        tokens = tokens[-limit:]
    return tokens
