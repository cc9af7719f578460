"""A byte-level BPE tokenizer: training it, and using one with the special tokens that this code base needs."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from etils import epath
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from kwaicoder_jax.data.special_tokens import SpecialTokens, known
from kwaicoder_jax.errors import UserError


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes stand for themselves, the others for 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to token ids and back; user text never becomes a special token. Immutable and picklable.

    Attributes:
      specials: the spelling of the special tokens; if none is given, the one among those of known families that it has.
      hash: hex SHA-256 of the serialised tokenizer.
      vocab_size: ids are below this number.
    """

    def __init__(self, serialized: str, specials: SpecialTokens | None = None):
        """Makes a tokenizer from the contents of a tokenizer.json (ValueError when it is none)."""
        self._serialized = serialized
        try:
            self._backend = Backend.from_str(serialized)
        except Exception as error:  # the binding raises bare Exception
            raise ValueError(f"not a tokenizer: {error}") from error
        # Special strings in a text are encoded as the ordinary characters they are. Not part of the serialised form.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self.specials = specials or known(self.special_id)
        self.hash = hashlib.sha256(serialized.encode()).hexdigest()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], specials: SpecialTokens | None = None) -> "Tokenizer":
        """Reads a tokenizer.json; UserError when it is missing or is none."""
        try:
            return cls(epath.Path(path).read_text(), specials)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot be read as a tokenizer ({error})", where=str(path)) from error

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[str, SpecialTokens]]:
        return Tokenizer, (self._serialized, self.specials)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and (self.hash, self.specials) == (other.hash, other.specials)

    def __hash__(self) -> int:
        return hash(self.hash)

    def serialized(self) -> str:
        """Returns the contents of the tokenizer.json."""
        return self._serialized

    def _special(self, field: str) -> int:
        token = getattr(self.specials, field)
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"the tokenizer has no token {token!r}", remedy=f"name its own in SpecialTokens.{field}")
        return found

    end_of_text = functools.cached_property(lambda self: self._special("end_of_text"))
    pad = functools.cached_property(lambda self: self._special("pad"))
    fim_prefix = functools.cached_property(lambda self: self._special("fim_prefix"))
    fim_suffix = functools.cached_property(lambda self: self._special("fim_suffix"))
    fim_middle = functools.cached_property(lambda self: self._special("fim_middle"))

    def special_id(self, spelling: str) -> int | None:
        """Returns the id of a token that was added to the vocabulary beside the text's own; None where there is none."""
        found = self._backend.token_to_id(spelling)
        return found if found in self._backend.get_added_tokens_decoder() else None

    def spelling(self, token: int) -> str | None:
        """Returns how the vocabulary spells a token; None outside of it."""
        return self._backend.id_to_token(token) if token >= 0 else None

    def begin(self) -> tuple[int, ...]:
        """Returns the special tokens that the tokenizer's own template puts before a text (Llama's BOS), if any."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        marks = encoding.special_tokens_mask
        return tuple(encoding.ids[: marks.index(0) if 0 in marks else len(marks)])

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without any special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text; several texts at once use several cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of `text` and the characters start:stop that each token touches, if only with a byte."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def special_strings(self) -> tuple[str, ...]:
        """The spelling of every special token, in the order of their ids; a text that holds one is none of ours."""
        added = self._backend.get_added_tokens_decoder()
        return tuple(added[number].content for number in sorted(added) if added[number].special)

    def renamed(self, names: Mapping[str, str]) -> "Tokenizer":
        """A tokenizer in which some special tokens have another spelling, with the ids that they had.

        Args:
          names: new spelling by old one. Old ones must be special tokens, new ones must not be there.

        Raises:
          UserError: an old spelling that is no special token, a new one that is taken.
        """
        if not names:
            return self
        content = json.loads(self._serialized)
        added = {entry["content"]: entry for entry in content.get("added_tokens", []) if entry["special"]}
        for old, new in names.items():
            if old not in added:
                raise UserError(f"{old!r} is no special token", remedy=f"they are {', '.join(sorted(added))}")
            if self._backend.token_to_id(new) is not None or list(names.values()).count(new) > 1:
                raise UserError(f"{new!r} is there already", remedy="it needs no other token")
            added[old]["content"] = new
        vocabulary = content["model"].get("vocab")
        if isinstance(vocabulary, dict):
            content["model"]["vocab"] = {names.get(token, token): number for token, number in vocabulary.items()}
        elif vocabulary is not None:  # of a unigram model: pairs of token and score
            content["model"]["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        return Tokenizer(json.dumps(content, ensure_ascii=False))

    def with_specials(self, spellings: Sequence[str]) -> "Tokenizer":
        """A tokenizer with further special tokens behind its last one; UserError for one that is there already."""
        backend = Backend.from_str(self._serialized)
        for spelling in spellings:
            if backend.token_to_id(spelling) is not None:
                raise UserError(f"{spelling!r} is there already", remedy="it needs no other token")
            backend.add_special_tokens([AddedToken(spelling, special=True, normalized=False)])
        return Tokenizer(backend.to_str(pretty=True)) if spellings else self

    def token_bytes(self, token: int) -> bytes:
        """Returns the bytes that a token of a byte-level vocabulary stands for; a special token gives its spelling."""
        piece = self._backend.id_to_token(int(token))
        if piece is None:
            raise ValueError(f"token {token} is outside the vocabulary of {self.vocab_size}")
        if int(token) in self._backend.get_added_tokens_decoder():
            return piece.encode()
        table = _byte_of_character()
        return bytes(table[character] for character in piece)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer; the same texts give the same tokenizer, to the byte.

    Digits are tokens of their own (as in SmolLM2 and StarCoder2), which makes arithmetic learnable by small models.
    The special tokens come first: `<|endoftext|>` is id 0. A corpus that is too small gives fewer tokens than asked.
    The template puts `<|endoftext|>` before a text, as our documents begin, for those who encode with special tokens:
    transformers and servers do, `Tokenizer.encode` does not.
    """
    specials = SpecialTokens().strings()
    smallest = 256 + len(specials)
    if vocab_size < smallest:
        raise UserError(
            f"{vocab_size} is too small", where="prepare_data.vocab_size", remedy=f"bytes and specials need {smallest}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(_byte_of_character()),
        show_progress=False,
    )
    backend.train_from_iterator(_iterate(texts), trainer)
    end = SpecialTokens().end_of_text
    backend.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, backend.token_to_id(end))]
    )
    return Tokenizer(backend.to_str(pretty=True))


def _iterate(texts: Iterable[str]) -> Iterator[str]:
    yield from texts
