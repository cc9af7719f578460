"""Continuous batching: requests join and leave between decode steps, and share what was computed of an equal prompt.

    engine = Engine(prepare(params, config), config, max_rows=8)
    generation = engine.submit(Request(prompt, max_new_tokens=64))
    engine.run()
    generation.ids

One step admits what has room, and draws one token for every row. Programs are compiled for sizes that are powers of two:
of rows, of slots (the cache's length), of prompts. An engine belongs to one thread; only `Generation.cancel` may be
called from another.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.decoding import Drawn, Prefix, Rows
from kwaicoder_jax.inference.programs import Placement, programs
from kwaicoder_jax.inference.requests import MOST_ALTERNATIVES, Generation, Request, Token
from kwaicoder_jax.inference.sampling import Settings
from kwaicoder_jax.inference.sizes import AHEAD, PREFILL_CHUNK, Sizes, prompt_chunk
from kwaicoder_jax.inference.weights import Weights
from kwaicoder_jax.models import ModelConfig, Runtime

Prompt = tuple[int, ...]


class Engine:
    """Serves requests from one set of weights.

    Attributes:
      weights: of the model.
      config: the model.
      max_tokens: the longest prompt and answer together.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        *,
        max_rows: int = 8,
        max_tokens: int = 2048,
        fixed_rows: bool = False,
        ahead: int = AHEAD,
        prefixes: int = 4,
        runtime: Runtime | None = None,
        placement: Placement | None = None,
    ):
        """Makes an engine without rows; nothing is compiled yet.

        Args:
          weights: from `prepare`.
          config: the model.
          max_rows: the most rows decoded together, rounded up to a power of two (times the mesh's shares).
          max_tokens: the longest prompt and answer together.
          fixed_rows: always decode `max_rows` rows, so that fewer programs are compiled.
          ahead: slots that a row is given beside those it fills.
          prefixes: how many prompts that were run are kept, to be shared by later requests.
          runtime: how to compute it.
          placement: on a mesh; None for one device.

        Raises:
          UserError: a size with which nothing can be served.
        """
        for name, value, least in (
            ("max_rows", max_rows, 1),
            ("max_tokens", max_tokens, 2),
            ("ahead", ahead, 1),
            ("prefixes", prefixes, 0),
        ):
            if value < least:
                raise UserError(f"{value} is too small", where=name, remedy=f"use {least} or more")
        self.weights, self.config, self.max_tokens = weights, config, max_tokens
        self._programs = programs(config, runtime or Runtime(), placement, weights.platform)
        self._sizes = Sizes(max_rows, max_tokens, ahead, fixed_rows, 1 if placement is None else placement.row_shares)
        self._waiting: collections.deque[Generation] = collections.deque()
        self._running: list[Generation | None] = []  # by row
        self._rows: Rows | None = None
        self._kept: collections.OrderedDict[Prompt, tuple[Prefix, int]] = collections.OrderedDict()  # and its row there
        self._most_kept = prefixes
        self._begun: tuple[list[Prompt], Prefix, int] | None = None  # prompts that are being run, and their next slot

    def submit(self, request: Request, where: str = "prompt") -> Generation:
        """Queues a request; UserError, about `where`, if it can never be served."""
        request.check(self.config.vocab_size, self.max_tokens, where)
        generation = Generation(request)
        self._waiting.append(generation)
        return generation

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> list[Generation]:
        """Requests that have a row."""
        return [generation for generation in self._running if generation is not None]

    @property
    def slots(self) -> int:
        """Length of the cache, 0 before the first request."""
        return 0 if self._rows is None else self._rows.cache.slots

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    def step(self) -> bool:
        """Admits what has room, and draws one token for every row; False if there was nothing to do."""
        if not self.admit():
            return False
        if self.running:
            self._fit()
            top = self._top(self.running)
            self._rows, drawn = self._programs.decode(weights=self.weights, rows=self._rows, top=top)
            self._take(drawn, self._running)
        return True

    def admit(self) -> bool:
        """The first half of a step: drops what was cancelled, and gives rows and first tokens to what has room.

        Prompts are run up to PREFILL_CHUNK tokens, so that those that have rows need not wait for long.

        Returns:
          False if nothing is waiting or running.
        """
        self._drop_cancelled()
        if not self._waiting and not self.running:
            return False
        self._admit()
        return True

    def _drop_cancelled(self) -> None:
        cancelled = [each for each in self._waiting if each.is_cancelled]
        if cancelled:
            gone = set(map(id, cancelled))  # another thread may cancel more of them at any moment
            self._waiting = collections.deque(each for each in self._waiting if id(each) not in gone)
        for generation in cancelled:
            generation.end("cancelled")
        cancelled = [generation for generation in self.running if generation.is_cancelled]
        for generation in cancelled:
            generation.end("cancelled")
        self._release()

    def _admit(self) -> None:
        """Runs prompts, up to so many tokens while other rows wait, and gives them rows."""
        budget = PREFILL_CHUNK
        while self._waiting and len(self.running) < self._sizes.max_rows:
            if self._waiting[0].request.prompt not in self._kept:
                if budget <= 0:
                    break
                budget -= self._prefill()
                continue
            prefix, _ = self._kept[self._waiting[0].request.prompt]
            joining: list[Generation] = []
            while self._waiting and len(self.running) + len(joining) < self._sizes.max_rows:
                kept = self._kept.get(self._waiting[0].request.prompt)
                if kept is None or kept[0] is not prefix:
                    break
                joining.append(self._waiting.popleft())
            self._join(joining, prefix)

    def _prefill(self) -> int:
        """Runs the next chunk of the prompts that wait first; returns its tokens."""
        if self._begun is None or self._begun[0][0] != self._waiting[0].request.prompt:
            prompts = self._together()
            slots = self._sizes.prompt_slots(len(prompts[0]))
            lengths_P = np.array([len(prompt) for prompt in prompts], np.int32)
            self._begun = (prompts, self._programs.empty_prefix(slots=slots, length_P=lengths_P), 0)
        prompts, prefix, start = self._begun
        slots = self._sizes.prompt_slots(len(prompts[0]))
        chunk = prompt_chunk(self.config, slots, PREFILL_CHUNK)
        padded_PS = np.zeros((len(prompts), slots), np.int32)
        for row, prompt in enumerate(prompts):
            padded_PS[row, slots - len(prompt) :] = prompt
        tokens_PT = padded_PS[:, start : start + chunk]
        prefix = self._programs.prefill(weights=self.weights, prefix=prefix, tokens_PT=tokens_PT)
        self._begun = (prompts, prefix, start + chunk)
        if start + chunk == slots:
            self._begun = None
            self._kept.update({prompt: (prefix, row) for row, prompt in enumerate(prompts)})
            while len(self._kept) > max(len(prompts), self._most_kept):
                self._kept.popitem(last=False)
        return len(prompts) * chunk

    def _together(self) -> list[Prompt]:
        """The prompts to be run next: the first that waits, and those right behind it that are about as long."""
        room, found = self._sizes.max_rows - len(self.running), dict[Prompt, None]()
        slots = self._sizes.prompt_slots(len(self._waiting[0].request.prompt))
        for generation in itertools.islice(self._waiting, room):
            prompt = generation.request.prompt
            if self._sizes.prompt_slots(len(prompt)) != slots or prompt in self._kept:
                break
            found[prompt] = None
        return list(found)[: self._sizes.prompts_together(slots, len(found))]

    def _join(self, joining: list[Generation], prefix: Prefix) -> None:
        """Gives requests whose prompts were run together their rows and first tokens."""
        self._fit(joining)
        free = [row for row, generation in enumerate(self._running) if generation is None]
        new: list[Generation | None] = [None] * len(self._running)
        source_B = np.full(len(self._running), -1, np.int32)
        for row, generation in zip(free, joining):
            new[row] = self._running[row] = generation
            source_B[row] = self._kept[generation.request.prompt][1]
            self._kept.move_to_end(generation.request.prompt)
        self._rows, drawn = self._programs.join(
            self.weights, self._rows, prefix, source_B, _settings(new), top=self._top(joining)
        )
        self._take(drawn, new)

    def _take(self, drawn: Drawn, generations: list[Generation | None]) -> None:
        """Hands each generation the token of its row."""
        ids, scores = jax.device_get((drawn.token_B, drawn.scores))
        for row, generation in enumerate(generations):
            if generation is not None:
                generation.add(_token(row, generation.request.logprobs, ids, scores))
        self._release()

    def _release(self) -> None:
        """Frees the rows of generations that ended."""
        ended = np.array([each is not None and each.reason is not None for each in self._running], bool)
        if ended.any():
            self._running = [None if done else each for done, each in zip(ended, self._running)]
            self._rows = self._programs.leave(self._rows, ended)

    def _fit(self, joining: Sequence[Generation] = ()) -> None:
        """Makes the cache as large as the rows need, or smaller when it was too large for a while."""
        members = [*self.running, *joining]
        now = (len(self._running), self.slots) if self.running else (0, 0)
        size = self._sizes.fitting(members, self.waiting, *now)
        if size == (len(self._running), self.slots):
            return
        rows, slots = size
        if not self.running:
            self._rows, self._running = None, [None] * rows  # the old cache goes before the new one comes
            self._rows = self._programs.empty_rows(rows=rows, slots=slots)
            return
        places = [row for row, generation in enumerate(self._running) if generation is not None]
        places += [-1] * (rows - len(places))
        self._rows = self._programs.resize(self._rows, np.array(places, np.int32), slots=slots)
        self._running = [None if place < 0 else self._running[place] for place in places]

    def _top(self, generations: Sequence[Generation]) -> int | None:
        """All alternatives or none: one program more, not six."""
        wanted = any(generation.request.logprobs is not None for generation in generations)
        return min(MOST_ALTERNATIVES, self.config.vocab_size) if wanted else None


def _token(row: int, logprobs: int | None, ids: np.ndarray, scores: Any) -> Token:
    if logprobs is None:
        return Token(int(ids[row]))
    top = zip(scores.top_BA[row, :logprobs].tolist(), scores.top_logprob_BA[row, :logprobs].tolist())
    return Token(int(ids[row]), float(scores.logprob_B[row]), tuple(top))


def _settings(generations: list[Generation | None]) -> Settings:
    """Of rows, greedy where there is no generation."""
    nothing = Request((0,), 1)
    rows = [nothing if generation is None else generation.request for generation in generations]
    values: dict[str, Any] = dict(
        seed_B=np.array([row.seed for row in rows], np.int32),
        id_B=np.array([row.sample for row in rows], np.uint32),
        temperature_B=np.array([row.temperature for row in rows], np.float32),
        top_k_B=np.array([row.top_k for row in rows], np.int32),
        top_p_B=np.array([row.top_p for row in rows], np.float32),
    )
    return Settings(**values)
