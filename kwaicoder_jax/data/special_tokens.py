"""The special tokens that this code base needs, and how open families spell them."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The spelling of the special tokens; other model families spell them differently."""

    end_of_text: str = "<|endoftext|>"
    pad: str = "<|pad|>"
    fim_prefix: str = "<|fim_prefix|>"
    fim_suffix: str = "<|fim_suffix|>"
    fim_middle: str = "<|fim_middle|>"

    def strings(self) -> tuple[str, ...]:
        """Returns all of them; their place here is their token id in tokenizers trained by `tokenizer.train`."""
        return dataclasses.astuple(self)

    def sentinels(self) -> tuple[str, str, str]:
        """Returns what marks prefix, suffix and middle."""
        return self.fim_prefix, self.fim_suffix, self.fim_middle


ENDS = ("<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>", "</s>")
PADS = ("<|pad|>", "<|fim_pad|>", "<fim_pad>", "<pad>", "<｜▁pad▁｜>", "<|finetune_right_pad_id|>")
# In PSM order as `infilling_prompt` writes it: Qwen2.5-Coder and CodeGemma (and this code base), StarCoder, SantaCoder,
# DeepSeek-Coder (whose hole marks the suffix, and whose end the middle), CodeLlama, GLM.
SENTINELS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
)
# What else a model writes when it has nothing more to say: pads, and the border of another file.
OTHER_STOPS = (*PADS, "<|repo_name|>", "<|file_sep|>", "<file_sep>", "▁<EOT>")


def known(id_of: Callable[[str], int | None]) -> SpecialTokens:
    """The spellings that a vocabulary has; ours where it has none. Without a token for padding it pads with the end.

    Args:
      id_of: a special token's id, None where there is none of that spelling.
    """
    usual = SpecialTokens()
    end = next((each for each in ENDS if id_of(each) is not None), usual.end_of_text)
    pad = next((each for each in PADS if id_of(each) is not None), end)
    whole = (names for names in SENTINELS if all(id_of(name) is not None for name in names))
    return SpecialTokens(end, pad, *next(whole, usual.sentinels()))
