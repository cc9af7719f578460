"""From pieces of answers to the JSON of completions, whole or streamed."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from experiments.serve_errors import of
from experiments.serve_requests import Call
from kwaicoder_jax import data
from kwaicoder_jax.inference import Answers, Piece, Token

DONE = "data: [DONE]\n\n"


class Reply:
    """The replies to one call."""

    def __init__(self, call: Call, answers: Answers | None, tokenizer: data.Tokenizer, model: str):
        """Makes one; `answers` is None where no token was asked for."""
        self._call, self._answers, self._tokenizer = call, answers, tokenizer
        self._drawn = 0
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self) -> dict[str, Any]:
        """All answers, when the last has ended."""
        texts, ends = list(self._call.echoes), {}
        tokens: list[list[tuple[Token, int]]] = [[] for _ in texts]
        async for piece in self._pieces():
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.tokens
            ends[piece.index] = piece.reason
        choices = [self._choice(i, text, tokens[i], ends[i]) for i, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; an error that comes up on the way is the last of them."""
        usage = {"usage": None} if self._call.include_usage else {}
        try:
            for index, text in enumerate(self._call.echoes):
                if text:
                    yield _event({**self._head, "choices": [self._choice(index, text, (), None)], **usage})
            async for piece in self._pieces():
                choice = self._choice(piece.index, piece.text, piece.tokens, piece.reason)
                yield _event({**self._head, "choices": [choice], **usage})
            if usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
        except Exception as error:
            yield _event((answer := of(error)).body())
            if answer.status == 500:
                raise  # into the log
            return
        yield DONE

    async def _pieces(self) -> AsyncIterator[Piece]:
        if self._answers is None:
            for index in range(len(self._call.echoes)):
                yield Piece(index, "", reason="length")
            return
        async for piece in self._answers:
            self._drawn += piece.drawn
            yield piece

    def _choice(self, index: int, text: str, tokens: Any, reason: str | None) -> dict[str, Any]:
        scores = self._scores(tokens) if self._call.logprobs and (tokens or reason) else None
        return {"text": text, "index": index, "logprobs": scores, "finish_reason": reason}

    def _scores(self, tokens: Any) -> dict[str, list[Any]]:
        return {
            "tokens": [self._spelling(token.id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [self._top(token) for token, _ in tokens],
            "text_offset": [start for _, start in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The most probable tokens and the drawn one; of two that are spelled alike the more probable one."""
        top: dict[str, float] = {}
        for each, logprob in (*token.top, (token.id, token.logprob)):
            assert logprob is not None
            top.setdefault(self._spelling(each), logprob)
        return top

    def _spelling(self, token: int) -> str:
        """The token's text; of one that is a part of a character its bytes, as OpenAI writes them."""
        text = self._tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" not in text:
            return text
        try:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._tokenizer.token_bytes(token))
        except KeyError:  # a vocabulary that is not byte-level
            return text

    def _usage(self) -> dict[str, int]:
        prompt = self._call.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._drawn, "total_tokens": prompt + self._drawn}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
