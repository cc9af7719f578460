"""The HTTP application: OpenAI's completions on a service, for any ASGI server."""

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from experiments import serve_errors, serve_requests
from experiments.loading import Loaded
from experiments.serve_errors import ApiError
from experiments.serve_replies import Reply
from kwaicoder_jax.inference import Answers, Service

GONE = 499  # nobody reads it: the client closed the connection
DRAINED = 8  # times the largest body: what is read and thrown away, so that a client hears why


class App:
    """The routes.

    Attributes:
      asgi: the application.
    """

    def __init__(self, loaded: Loaded, service: Service, *, model: str, max_body_bytes: int):
        """Makes an application on a service that is started.

        Args:
          loaded: the model.
          service: runs it.
          model: its name for clients.
          max_body_bytes: longer requests are refused.
        """
        self._loaded, self._service, self._model, self._most_bytes = loaded, service, model, max_body_bytes
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.one_model),
            Route("/health", self.health),
        ]
        self.asgi = Starlette(routes=routes, exception_handlers=serve_errors.HANDLERS)

    async def completions(self, request: Request) -> Response:
        """Completes or infills."""
        try:
            body = await self._read(request)
        except ClientDisconnect:
            return Response(status_code=GONE)
        # Not in the loop: the tokens of a long prompt take a while.
        call = await asyncio.to_thread(serve_requests.parse, body, self._loaded, self._model, self._service.most)
        answers = None
        if not call.is_empty:
            answers = Answers(self._service, self._loaded.tokenizer, call.requests, call.stops)
        reply = Reply(call, answers, self._loaded.tokenizer, self._model)
        if call.stream:
            return _Stream(reply, answers)
        try:
            return await _unless_gone(request, reply)
        finally:
            if answers is not None:
                answers.cancel()

    async def models(self, request: Request) -> Response:
        """The one model, in a list."""
        del request
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def one_model(self, request: Request) -> Response:
        """The one model by its name."""
        if request.path_params["model"] != self._model:
            raise ApiError(404, f"there is no such model; this server has {self._model!r}", code="model_not_found")
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        """Whether requests are served: 200 or 503."""
        del request
        if self._service.error is not None:
            return JSONResponse({"status": "failed", "error": type(self._service.error).__name__}, 503)
        if self._service.is_closed:
            return JSONResponse({"status": "closing", "requests": self._service.live}, 503)
        return JSONResponse({"status": "ok", "requests": self._service.live})

    def _card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": 0, "owned_by": "kwaicoder_jax"}

    async def _read(self, request: Request) -> bytes:
        """The body; ApiError if it is too long, when the client is likely to listen again."""
        body, length = bytearray(), 0
        async for chunk in request.stream():
            length += len(chunk)
            if length <= self._most_bytes:
                body += chunk
            elif length > DRAINED * self._most_bytes:
                break
        if length > self._most_bytes:
            raise ApiError(413, f"the body is longer than {self._most_bytes} bytes", code="body_too_large")
        return bytes(body)


async def _unless_gone(request: Request, reply: Reply) -> Response:
    """The whole reply; where the client leaves before, nothing is waited for."""
    whole, gone = asyncio.ensure_future(reply.whole()), asyncio.ensure_future(_disconnect(request.receive))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(whole.result()) if whole.done() else Response(status_code=GONE)
    finally:
        whole.cancel()
        gone.cancel()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stream(StreamingResponse):
    """A stream of events. However it ends, its answers are cancelled: whoever left does not read on."""

    def __init__(self, reply: Reply, answers: Answers | None):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(reply.events(), media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._answers is not None:
                self._answers.cancel()
