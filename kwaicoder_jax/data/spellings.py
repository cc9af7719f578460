"""How open families spell their special tokens, so that a model of theirs infills and ends without being told how.

Fill-in-the-middle, in PSM order as `infilling_prompt` writes it: Qwen2.5-Coder and CodeGemma (and this code base),
StarCoder, SantaCoder, DeepSeek-Coder, CodeLlama.
"""

import dataclasses

from kwaicoder_jax.data.tokenizer import SpecialTokens, Tokenizer

ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>", "</s>")
SENTINELS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)
# What else a model writes when it has nothing more to say: pads, and the border of another file.
OTHER_STOPS = ("<|pad|>", "<|fim_pad|>", "<fim_pad>", "<|repo_name|>", "<|file_sep|>", "<file_sep>", "▁<EOT>")


def with_known_specials(tokenizer: Tokenizer, end: int | None = None) -> Tokenizer:
    """The tokenizer, its specials spelled as its own vocabulary does; what it has not stays as it was.

    Args:
      tokenizer: any.
      end: id of the token that ends a text, where that is known.
    """
    specials = tokenizer.specials
    ending = tokenizer.spelling(end) if end is not None else None
    ending = ending or next((each for each in ENDS if tokenizer.special_id(each) is not None), specials.end_of_text)
    sentinels = next((names for names in SENTINELS if _has(tokenizer, names)), None)
    prefix, suffix, middle = sentinels or (specials.fim_prefix, specials.fim_suffix, specials.fim_middle)
    known = dataclasses.replace(
        specials, end_of_text=ending, fim_prefix=prefix, fim_suffix=suffix, fim_middle=middle
    )  # fmt: skip
    return Tokenizer(tokenizer.serialized(), known)


def can_infill(tokenizer: Tokenizer) -> bool:
    """Whether it has the three sentinels."""
    return _has(tokenizer, _sentinels(tokenizer.specials))


def stop_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What ends a text or an infilled middle: the end token, the sentinels, pads, borders of files."""
    names = (tokenizer.specials.end_of_text, *_sentinels(tokenizer.specials), *ENDS, *OTHER_STOPS)
    return frozenset(found for name in names if (found := tokenizer.special_id(name)) is not None)


def _sentinels(specials: SpecialTokens) -> tuple[str, str, str]:
    return specials.fim_prefix, specials.fim_suffix, specials.fim_middle


def _has(tokenizer: Tokenizer, names: tuple[str, ...]) -> bool:
    return all(tokenizer.special_id(name) is not None for name in names)
