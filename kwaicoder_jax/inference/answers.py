"""The answers of a service as text, in pieces, for an asyncio loop."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence

from kwaicoder_jax.data import Tokenizer
from kwaicoder_jax.inference.requests import Generation, Reason, Request, Token
from kwaicoder_jax.inference.service import Service, Unavailable
from kwaicoder_jax.inference.text import Detokenizer, StopStrings


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of one answer.

    Attributes:
      index: of the answer among the requests.
      text: whole characters, before any stop string.
      tokens: that begin in it, each with the character of the answer at which it begins.
      reason: why the answer ended, in its last piece; else None.
      drawn: how many tokens were drawn for it, in its last piece.
    """

    index: int
    text: str
    tokens: tuple[tuple[Token, int], ...] = ()
    reason: Reason | None = None
    drawn: int = 0


class Answers:
    """Asks a service, and iterates over pieces of all answers as they come.

    async for piece in Answers(service, tokenizer, requests, stops): ...
    """

    def __init__(self, service: Service, tokenizer: Tokenizer, requests: Sequence[Request], stops: Sequence[str] = ()):
        """Submits the requests, all or none.

        Args:
          service: to ask.
          tokenizer: of the model.
          requests: without callbacks.
          stops: strings before which an answer ends.

        Raises:
          UserError, Full, Unavailable: see `Service.submit`.
        """
        self._loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | BaseException]()
        self._left = len(requests)
        texts = [_Text(self, index, tokenizer, stops) for index in range(len(requests))]
        asked = [dataclasses.replace(r, on_token=t.on_token, on_end=t.on_end) for r, t in zip(requests, texts)]
        self._tickets = service.submit(asked, on_failure=self.put)

    def put(self, piece: Piece | BaseException) -> None:
        """Hands a piece, or what went wrong, from the engine's thread to the loop."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while self._left:
            piece = await self._pieces.get()
            if isinstance(piece, BaseException):
                raise Unavailable("the engine failed") from piece
            if piece.reason == "cancelled":
                raise Unavailable("the engine is closed")
            self._left -= piece.reason is not None
            yield piece

    def cancel(self) -> None:
        """Ends all answers that have not ended; nobody is interested in them any more."""
        for ticket in self._tickets:
            ticket.cancel()


class _Text:
    """From the tokens of one request to pieces, in the engine's thread."""

    def __init__(self, answers: Answers, index: int, tokenizer: Tokenizer, stops: Sequence[str]):
        self._answers, self._index = answers, index
        self._detokenizer, self._stops = Detokenizer(tokenizer), StopStrings(stops)
        self._new = ""  # text that is certain and not out
        self._known = self._given = 0  # characters that tokens gave so far, and those that are out
        self._tokens: list[tuple[Token, int]] = []  # whose text is not out

    def on_token(self, token: Token) -> bool:
        """As `Request.on_token`."""
        self._tokens.append((token, self._known))
        piece = self._detokenizer.push(token.id)
        self._known += len(piece)
        self._new += self._stops.push(piece)
        if self._new and not self._stops.found:  # else `on_end` follows
            self._answers.put(self._piece())
        return self._stops.found

    def on_end(self, generation: Generation) -> None:
        """As `Request.on_end`."""
        self._new += self._stops.push(self._detokenizer.finish())
        self._new += self._stops.finish()
        cut = self._stops.found
        last = self._piece(everything=not cut)
        reason = "stop" if cut else generation.reason
        self._answers.put(dataclasses.replace(last, reason=reason, drawn=len(generation.tokens)))

    def _piece(self, everything: bool = False) -> Piece:
        """What is new, with the tokens that begin in it, or all that are left."""
        text, self._new = self._new, ""
        self._given += len(text)
        out = [each for each in self._tokens if everything or each[1] < self._given]
        self._tokens = self._tokens[len(out) :]  # they begin in their order
        return Piece(self._index, text, tuple(out))
