"""From tokens to text as they come: whole characters only, and an end at the first stop string."""

from collections.abc import Sequence

from kwaicoder_jax.data import Tokenizer
from kwaicoder_jax.errors import UserError

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character (yet)
MOST_STOPS = 16


class Detokenizer:
    """Gives out the text of a growing list of tokens, each character as soon as it is certain.

    What it gave out, joined, is at every moment the beginning of what `Tokenizer.decode` gives for all tokens, and after
    `finish` all of it (but for bytes that are no text in a sentence-piece decoder, which take their neighbours along).
    A character can take the bytes of several tokens. Tokens are decoded together with those of the
    character before, since some decoders treat the first token of a text in their own way (they strip its space).
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # tokens whose text is out
        self._given = 0  # characters of the text of `_before` and `_open` that are out
        self._open: list[int] = []  # tokens that may end inside a character

    def push(self, token: int) -> str:
        """The text that became certain with this token, often "" inside a character."""
        self._open.append(token)
        text = self._tokenizer.decode(self._before + self._open)
        whole = text.rstrip(_REPLACEMENT)  # an incomplete character is one or several of these
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if whole == text:
            self._before, self._open = self._open, []
            self._given = len(self._tokenizer.decode(self._before))
        return new

    def finish(self) -> str:
        """The rest: a character that was never completed."""
        return self._tokenizer.decode(self._before + self._open)[self._given :]


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string in it.

    Of several the one that is complete first counts, and of those that end together the longest; how the text is cut
    into pieces makes no difference. What may be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], where: str = "stop"):
        if len(stops) > MOST_STOPS:
            raise UserError(f"{len(stops)} stop strings", where=where, remedy=f"give at most {MOST_STOPS}")
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty", where=where, remedy="leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that can be given out now; after the stop string was found, nothing more."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, where no stop string came of it."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextStream:
    """Both at once: tokens in, text out, `stopped` once a stop string was met.

    Attributes:
      text: all that was given out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stops.found

    def push(self, token: int) -> str:
        """The text that is out with this token."""
        return self._out(self._stops.push(self._detokenizer.push(token)))

    def finish(self) -> str:
        """The rest, when no token follows."""
        return self._out(self._stops.push(self._detokenizer.finish()) + self._stops.finish())

    def _out(self, new: str) -> str:
        self.text += new
        return new
