"""The byte-level BPE tokenizer that a GGUF file describes: tokens, merges, and by name how text is cut before them."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from kwaicoder_jax import data
from kwaicoder_jax.huggingface.fields import Fields

_KEY = "tokenizer.ggml."
_CONTROL, _USER_DEFINED = 3, 4  # of token_type

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|{NUMBERS}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"qwen2": _GPT4.replace("{NUMBERS}", r"\p{N}"), "llama-bpe": _GPT4.replace("{NUMBERS}", r"\p{N}{1,3}")}
_DIGITS = ("smollm", "starcoder", "refact")  # every digit apart, then as GPT-2
_GPT2 = ("gpt-2", "gpt2", "default")


def build(metadata: Fields) -> data.Tokenizer:
    """The tokenizer; UserError for a kind that is not byte-level BPE, or that cuts text in a way that is not known."""
    kind, cut = metadata.get(f"{_KEY}model"), metadata.get(f"{_KEY}pre", "default")
    remedy = "name the model's tokenizer.json (--tokenizer=FILE)"
    if kind != "gpt2":
        raise metadata.error(f"{_KEY}model", f"a tokenizer of kind {kind!r} is not rebuilt from GGUF", remedy)
    if cut not in (*_SPLITS, *_DIGITS, *_GPT2):
        raise metadata.error(f"{_KEY}pre", f"how {cut!r} cuts text is not known here", remedy)
    tokens, merges = metadata.get(f"{_KEY}tokens", []), metadata.get(f"{_KEY}merges", [])
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(cut)
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    kinds = metadata.get(f"{_KEY}token_type", [])
    added = [(t, k) for t, k in zip(tokens, kinds) if k in (_CONTROL, _USER_DEFINED)]
    backend.add_tokens([AddedToken(t, special=k == _CONTROL, normalized=False) for t, k in added])
    return data.Tokenizer(backend.to_str(pretty=True))


def _pre_tokenizer(cut: str) -> pre_tokenizers.PreTokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut not in _SPLITS)
    if cut in _SPLITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(_SPLITS[cut]), "isolated"), plain])
    if cut in _DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain


def companions(metadata: Fields) -> dict[str, str]:
    """tokenizer_config.json with the special tokens and the chat template."""
    tokens, values = metadata.get(f"{_KEY}tokens", []), {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = metadata.get(f"{_KEY}{theirs}_token_id")
        if number is not None and int(number) < len(tokens):
            values[f"{name}_token"] = tokens[int(number)]
    if template := metadata.get("tokenizer.chat_template"):
        values["chat_template"] = template
    return {"tokenizer_config.json": json.dumps(values, indent=2, ensure_ascii=False) + "\n"}
