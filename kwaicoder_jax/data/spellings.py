"""Where a model's texts end, so that a model of any open family infills and ends without being told how."""

import dataclasses

from kwaicoder_jax.data.special_tokens import ENDS, OTHER_STOPS
from kwaicoder_jax.data.tokenizer import Tokenizer


def with_end(tokenizer: Tokenizer, end: int | None) -> Tokenizer:
    """The tokenizer, with the token that a model's config says ends its texts; unchanged where there is none."""
    spelling = tokenizer.spelling(end) if end is not None else None
    if spelling is None:
        return tokenizer
    return Tokenizer(tokenizer.serialized(), dataclasses.replace(tokenizer.specials, end_of_text=spelling))


def can_infill(tokenizer: Tokenizer) -> bool:
    """Whether it has the three sentinels."""
    return all(tokenizer.special_id(name) is not None for name in tokenizer.specials.sentinels())


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text or an infilled middle: the end token, the sentinels, pads, borders of files."""
    specials = tokenizer.specials
    names = (specials.end_of_text, *specials.sentinels(), *ENDS, *OTHER_STOPS)
    return frozenset(found for name in names if (found := tokenizer.special_id(name)) is not None)
