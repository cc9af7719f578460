"""What goes wrong with a request, in the JSON of OpenAI's interface."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import Full, Unavailable

RETRY_SECONDS = 1


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: of HTTP.
      message: one line: what is wrong and what would be right.
      param: the field of the request.
      code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kinds = {429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def of(error: Exception) -> ApiError:
    """Any error as one for the client; what nobody foresaw says no more than that."""
    match error:
        case ApiError():
            return error
        case UserError():
            return ApiError(400, str(error), param=error.where or None, code="invalid_value")
        case Full():
            return ApiError(429, f"{error}; try again later", code="queue_full")
        case Unavailable():
            return ApiError(503, str(error), code="unavailable")
        case HTTPException():
            return ApiError(error.status_code, error.detail, code={404: "not_found"}.get(error.status_code))
    return ApiError(500, "the server made a mistake; its log has more", code="internal_error")


async def respond(request: Request, error: Exception) -> Response:
    """An exception handler for Starlette."""
    del request
    answer = of(error)
    headers = dict(getattr(error, "headers", None) or {})
    if answer.status == 429:
        headers["Retry-After"] = str(RETRY_SECONDS)
    if answer.status == 413:
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse(answer.body(), answer.status, headers)


HANDLERS: Any = {error: respond for error in (ApiError, UserError, Full, Unavailable, HTTPException, Exception)}
