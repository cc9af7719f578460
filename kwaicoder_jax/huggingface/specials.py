"""Special tokens that a model was not trained with: unused ones get their role and name, or the table gets new rows.

A model without fill-in-the-middle tokens can be trained to infill, if four tokens mark the parts. Many tokenizers hold
special tokens that hardly any text has; renaming those keeps the model's shape. Otherwise the vocabulary grows: first into
rows that belong to no token yet, then by rows that are the mean of the table, so that a new token begins as probable as
an average one (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from kwaicoder_jax import data, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface.weights import Weight, Weights

NEW = "new"  # in place of the token that is renamed
_ROWS = 4096  # read at once for the mean


def check(specials: Mapping[str, str]) -> None:
    """UserError for a role that there is not."""
    roles = [field.name for field in dataclasses.fields(data.SpecialTokens)]
    for role in specials:
        if role not in roles:
            raise UserError("no such role", where=f"specials.{role}", remedy=f"the roles are {', '.join(roles)}")


def give(tokenizer: data.Tokenizer, specials: Mapping[str, str]) -> data.Tokenizer:
    """The tokenizer in which each role of `specials` has its usual spelling: by a token renamed, or by a new one.

    Raises:
      UserError: an unknown role, a token that is not special or takes two roles, a spelling that is taken.
    """
    check(specials)
    usual = dataclasses.asdict(data.SpecialTokens())
    used = [old for old in specials.values() if old != NEW]
    if twice := sorted({old for old in used if used.count(old) > 1}):
        raise UserError(f"{twice[0]!r} cannot take two roles", where="specials", remedy="name another token for one")
    try:
        renamed = tokenizer.renamed({old: usual[role] for role, old in specials.items() if old != NEW})
        return renamed.with_specials([usual[role] for role, old in specials.items() if old == NEW])
    except UserError as error:
        raise UserError(error.what, where="specials", remedy=error.remedy) from error


def rename(companions: Mapping[str, str], specials: Mapping[str, str]) -> dict[str, str]:
    """The texts of the tokenizer's other files with the new spellings."""
    usual, renamed = dataclasses.asdict(data.SpecialTokens()), dict(companions)
    for role, old in specials.items():
        for name, text in renamed.items():
            if name.endswith(".json"):
                renamed[name] = text.replace(f'"{old}"', f'"{usual[role]}"')
    return renamed


def extend(
    config: models.ModelConfig, tensors: Weights, tables: Sequence[str], vocab_size: int
) -> tuple[models.ModelConfig, Weights]:
    """A vocabulary of `vocab_size` tokens, where the model's is smaller.

    Args:
      config: of the model.
      tensors: its weights.
      tables: names of those whose rows belong to tokens.
      vocab_size: tokens of the tokenizer.
    """
    if vocab_size <= config.vocab_size:
        return config, tensors
    longer = {name: _longer(tensors[name], vocab_size) for name in tables if name in tensors}
    return config.replace(vocab_size=vocab_size), Weights({**tensors, **longer}, tensors.where, tensors.identity)


def _longer(weight: Weight, rows: int) -> Weight:
    """A table with more rows, each the mean of those that were there."""
    count = weight.shape[0]

    def read(start: int, stop: int) -> np.ndarray:
        old = weight.rows(min(start, count), min(stop, count)) if start < count else None
        if stop <= count:
            assert old is not None
            return old
        new = np.broadcast_to(_mean(weight), (stop - max(start, count), *weight.shape[1:])).astype(weight.dtype)
        return new if old is None else np.concatenate([old, new])

    return dataclasses.replace(weight, shape=(rows, *weight.shape[1:]), rows=read)


def _mean(weight: Weight) -> np.ndarray:
    """Of all rows, summed in float64."""
    starts = range(0, weight.shape[0], _ROWS)
    sums = [weight.rows(i, min(i + _ROWS, weight.shape[0])).sum(0, dtype=np.float64) for i in starts]
    return np.sum(sums, axis=0) / weight.shape[0]
