"""The HTTP server under the application: uvicorn, which ends when a signal comes, after what runs has ended."""

import asyncio
import math
import socket
from typing import Any

import uvicorn

from experiments.serve_app import App
from kwaicoder_jax.inference import Service

__all__ = ["App", "HttpServer"]
# Seconds for replies that say that the server ends. They come after the engine's step, which may just compile a program.
LAST_WORDS = 60.0


class HttpServer(uvicorn.Server):
    """Serves until SIGTERM or Ctrl-C: then takes no connection, and gives running requests their time."""

    def __init__(self, app: Any, service: Service, grace_seconds: float):
        """Makes a server; `run([listening socket])` serves."""
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                http="h11",
                ws="none",
                lifespan="off",
                loop="asyncio",
                timeout_graceful_shutdown=math.ceil(grace_seconds + LAST_WORDS),
            )
        )
        self._service, self._grace = service, grace_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which waits for open requests; these end when their answers are cancelled."""
        timer = asyncio.get_running_loop().call_later(self._grace, self._service.cancel_all)
        await super().shutdown(sockets)
        timer.cancel()
