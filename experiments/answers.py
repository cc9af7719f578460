"""Answers on standard output: one after the other in the order of the prompts, the first unfinished one as it comes."""

import json
from typing import Any, BinaryIO

from kwaicoder_jax.inference import Generation, Token
from kwaicoder_jax.inference.text import TextStream


class Writer:
    """Writes answers that are worked on together in their order, as UTF-8 whatever the terminal is set to.

    Attributes:
      count: of the answers.
      ended: how many ended.
      streams: whether text is written as it comes.
    """

    def __init__(self, out: BinaryIO, count: int, *, stream: bool, end_lines: bool, as_json: bool):
        """Makes a writer.

        Args:
          out: gets the text.
          count: of the answers.
          stream: write text as it comes, not when its answer has ended.
          end_lines: end an answer with a newline where it has none, even a single one.
          as_json: one object a line instead of the texts.
        """
        self.count, self.ended = count, 0
        self._out, self.streams, self._as_json = out, stream and not as_json, as_json
        self._end_lines = end_lines or count > 1 or as_json
        self._waiting = [""] * count  # text that is not out
        self._records: list[dict[str, Any] | None] = [None] * count  # of answers that ended
        self._current = 0  # all before it are out
        self._last = ""  # character of it that was written

    def push(self, index: int, text: str) -> None:
        """More text of one answer."""
        self._waiting[index] += text
        if index == self._current and self.streams:
            self._write(index)

    def end(self, index: int, record: dict[str, Any]) -> None:
        """It ended; `record` is what JSON says of it beside its text."""
        self._records[index], self.ended = record, self.ended + 1
        while self._current < self.count and (done := self._records[self._current]) is not None:
            if self._as_json:
                line = json.dumps({**done, "text": self._waiting[self._current]}, ensure_ascii=False)
                self._waiting[self._current] = line
            self._write(self._current)
            if self._end_lines and self._last != "\n":
                self._out.write(b"\n")
            self._current, self._last = self._current + 1, ""
            if self._current < self.count and self.streams:
                self._write(self._current)
        self._out.flush()

    def _write(self, index: int) -> None:
        text, self._waiting[index] = self._waiting[index], ""
        if text:
            self._out.write(text.encode())
            self._out.flush()
            self._last = text[-1]


class Answer:
    """What becomes of one request: its tokens as text, to the writer."""

    def __init__(self, writer: Writer, index: int, text: TextStream, *, before: str, behind: str, **record: Any):
        """Makes an answer; `before` and `behind` are written around it, `record` is for JSON."""
        self._writer, self._index, self._text, self._behind, self._record = writer, index, text, behind, record
        if before:
            writer.push(index, before)

    def on_token(self, token: Token) -> bool:
        """As `Request.on_token`."""
        if piece := self._text.push(token.id):
            self._writer.push(self._index, piece)
        return self._text.stopped

    def on_end(self, generation: Generation) -> None:
        """As `Request.on_end`."""
        self._writer.push(self._index, self._text.finish() + self._behind)
        reason = "stop" if self._text.stopped else generation.reason
        self._writer.end(self._index, {**self._record, "tokens": len(generation.tokens), "finish_reason": reason})
