"""What an engine is asked for, and what becomes of it."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from kwaicoder_jax.errors import UserError

MOST_ALTERNATIVES = 5  # most probable tokens that a request may ask for beside the drawn one

Reason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Token:
    """One drawn token.

    Attributes:
      id: of the token.
      logprob: log probability in nats under the model, before temperature, top-k and top-p, if it was asked for.
      top: the most probable tokens and their log probabilities, as many as the request asked for.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how to go on from it.

    Attributes:
      prompt: token ids, one or more (begin with the tokenizer's BOS if the model was trained so).
      max_new_tokens: the most tokens to draw, 1 or more.
      temperature: 0 takes the most probable token (the lowest id among equals); else logits are divided by it.
      top_k: draw among so many of the most probable tokens; 0 for all.
      top_p: of those, among the fewest most probable that sum to this probability.
      stop_tokens: generation ends when one of these is drawn; it is left out.
      seed: token p of a row is drawn with randomness from (seed, sample, p) and nothing else.
      sample: tells apart the samples that share a seed.
      logprobs: report log probabilities, and so many of the most probable tokens beside the drawn one; None for neither.
      on_token: called with each token (not with a stop token) as it is drawn; True ends the generation ("stop").
      on_end: called once, when the generation ended.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: frozenset[int] = frozenset()
    seed: int = 0
    sample: int = 0
    logprobs: int | None = None
    on_token: Callable[["Token"], bool | None] | None = dataclasses.field(default=None, compare=False)
    on_end: Callable[["Generation"], None] | None = dataclasses.field(default=None, compare=False)

    def check(self, vocab_size: int, max_tokens: int, where: str = "prompt") -> None:
        """UserError for a prompt or a setting that no engine of these sizes can serve."""
        for name, value, low, high, right in (
            ("max_new_tokens", self.max_new_tokens, 1, 2**31 - 1, "1 or more"),
            ("temperature", self.temperature, 0.0, 1e6, "0 (greedy) or more"),
            ("top_k", self.top_k, 0, 2**31 - 1, "0 (all) or more"),
            ("top_p", self.top_p, 1e-9, 1.0, "more than 0, at most 1"),
            ("seed", self.seed, -(2**31), 2**31 - 1, "a 32-bit integer"),
            ("sample", self.sample, 0, 2**32 - 1, "a 32-bit integer, 0 or more"),
            ("logprobs", self.logprobs or 0, 0, MOST_ALTERNATIVES, f"0 to {MOST_ALTERNATIVES}"),
        ):
            if not low <= value <= high:  # NaN too
                raise UserError(f"{value} is out of range", where=name, remedy=f"use {right}")
        if not self.prompt:
            remedy = "begin with the tokenizer's BOS or another token"
            raise UserError("no tokens to continue", where=where, remedy=remedy)
        outside = [token for token in self.prompt if not 0 <= token < vocab_size]
        if outside:
            what = f"token {outside[0]} is outside the vocabulary of {vocab_size}"
            raise UserError(what, where=where, remedy="encode with the checkpoint's own tokenizer")
        if len(self.prompt) + self.max_new_tokens > max_tokens:
            what = f"{len(self.prompt)} tokens and {self.max_new_tokens} new ones are more than {max_tokens}"
            raise UserError(what, where=where, remedy="shorten the prompt, ask for less, or start with room for more")


@dataclasses.dataclass(eq=False)
class Generation:
    """A request in the engine; `tokens` grows until `reason` says why it ended.

    Attributes:
      request: what was asked for.
      tokens: drawn so far, without a stop token.
      reason: "stop" (a stop token, or `on_token` said so), "length", "cancelled"; None while it runs.
    """

    request: Request
    tokens: list[Token] = dataclasses.field(default_factory=list)
    reason: Reason | None = None
    _cancelled: bool = False

    def cancel(self) -> None:
        """Asks for an end; from any thread. The engine takes it up before its next step."""
        self._cancelled = True

    @property
    def ids(self) -> list[int]:
        """Token ids drawn so far."""
        return [token.id for token in self.tokens]

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def longest(self) -> int:
        """The most tokens that prompt and answer can have."""
        return len(self.request.prompt) + self.request.max_new_tokens

    def add(self, token: Token) -> None:
        """Takes a drawn token, and ends where that is due."""
        if token.id in self.request.stop_tokens:
            self.end("stop")
            return
        self.tokens.append(token)
        if self.request.on_token is not None and self.request.on_token(token):
            self.end("stop")
        elif len(self.tokens) >= self.request.max_new_tokens:
            self.end("length")

    def end(self, reason: Reason) -> None:
        """Ends it, once."""
        self.reason = reason
        if self.request.on_end is not None:
            self.request.on_end(self)
