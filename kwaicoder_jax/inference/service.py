"""An engine in a thread of its own: any thread asks, as many wait as may, and a failure is told to everyone.

    with Service(engine, most=72) as service:
        tickets = service.submit([Request(prompt, 64, on_token=..., on_end=...)], on_failure=...)

Callbacks run in the engine's thread, and should only hand on what they get.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.engine import Engine
from kwaicoder_jax.inference.requests import Generation, Request, Token


class Full(Exception):
    """As many requests are running and waiting as may; later there is room again."""


class Unavailable(Exception):
    """The engine failed or is closed; nothing is served any more."""


class Ticket:
    """A request of a service, from when it was submitted to when it ended."""

    def __init__(self, service: "Service", request: Request, on_failure: Callable[[BaseException], None]):
        self._service, self._asked, self._on_failure = service, request, on_failure
        self._generation: Generation | None = None
        self._cancelled = False
        self._error: Exception | None = None
        self.request = dataclasses.replace(request, on_token=self._token, on_end=self._end)

    def cancel(self) -> None:
        """Asks for an end; from any thread, as often as you like."""
        self._cancelled = True
        if (generation := self._generation) is not None:
            generation.cancel()

    def begin(self, engine: Engine) -> None:
        """Hands it to the engine, in the engine's thread."""
        self._generation = engine.submit(self.request)
        if self._cancelled:
            self._generation.cancel()

    def fail(self, error: BaseException) -> None:
        """Tells whoever asked that there will be no (further) answer."""
        with contextlib.suppress(Exception):  # nobody is there any more
            self._on_failure(error)

    def _token(self, token: Token) -> bool | None:
        """The caller's callback; one that fails ends its own request and no other."""
        try:
            return self._asked.on_token(token) if self._asked.on_token is not None else None
        except Exception as error:
            self._error = error
            return True

    def _end(self, generation: Generation) -> None:
        self._service.remove(self)
        if self._error is None:
            try:
                if self._asked.on_end is not None:
                    self._asked.on_end(generation)
                return
            except Exception as error:
                self._error = error
        self.fail(self._error)


class Service:
    """Runs an engine in a thread.

    Attributes:
      most: requests that run and wait at the same time.
      error: what ended the engine; None while it works.
    """

    def __init__(self, engine: Engine, *, most: int, on_error: Callable[[BaseException], None] | None = None):
        """Makes a service; `start` it.

        Args:
          engine: nobody else uses it from now on.
          most: requests that run and wait at the same time.
          on_error: told, in the engine's thread, what ended the engine.
        """
        self.most = most
        self.error: BaseException | None = None
        self._engine, self._on_error = engine, on_error
        self._changed = threading.Condition()  # guards what follows
        self._arrived: list[Ticket] = []  # not yet with the engine
        self._live: set[Ticket] = set()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing more, by request."""
        return self._closed

    @property
    def live(self) -> int:
        """Requests that run or wait."""
        return len(self._live)

    def submit(self, requests: Sequence[Request], on_failure: Callable[[BaseException], None]) -> list[Ticket]:
        """Takes all of the requests or none.

        Args:
          requests: each ends with its `on_end`, unless the service fails before.
          on_failure: called once for each of them that will not end, from the engine's thread or this one.

        Raises:
          UserError: one that the engine can never serve, or more than may wait at all.
          Full: there is no room for them now.
          Unavailable: there is no engine.
        """
        for request in requests:
            request.check(self._engine.config.vocab_size, self._engine.max_tokens)
        if len(requests) > self.most:
            what = f"{len(requests)} answers at once, at most {self.most} are possible"
            raise UserError(what, where="n", remedy="ask for fewer samples or prompts")
        with self._changed:
            if self._closed or self.error is not None:
                raise Unavailable("the engine is closed" if self.error is None else "the engine failed")
            if len(self._live) + len(requests) > self.most:
                raise Full(f"{len(self._live)} requests are running or waiting, as many as may")
            tickets = [Ticket(self, request, on_failure) for request in requests]
            self._live.update(tickets)
            self._arrived += tickets
            self._changed.notify_all()
        return tickets

    def remove(self, ticket: Ticket) -> None:
        """Takes note that a request ended."""
        with self._changed:
            self._live.discard(ticket)

    def cancel_all(self) -> None:
        """Cancels everything, and takes nothing more; does not wait."""
        with self._changed:
            self._closed = True
            for ticket in self._live:
                ticket.cancel()
            self._changed.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Cancels everything and waits for the thread; False if it still runs after `timeout` seconds."""
        self.cancel_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while self._take_arrived():
                while self._engine.step():
                    self._begin_arrived()
        except BaseException as error:
            self._fail(error)

    def _take_arrived(self) -> bool:
        """Waits for requests and hands them to the engine; False when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._closed)
            if not self._arrived:
                return False
        self._begin_arrived()
        return True

    def _begin_arrived(self) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        for ticket in arrived:
            ticket.begin(self._engine)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.error, lost = error, list(self._live)
            self._live.clear()
            self._arrived.clear()
        if self._on_error is not None:
            self._on_error(error)
        for ticket in lost:
            ticket.fail(error)
