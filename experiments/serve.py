"""Serves a model over HTTP with OpenAI's completions interface.

python -m experiments.serve --checkpoint=runs/demo/cpt --port=8000
curl localhost:8000/v1/completions -d '{"prompt": "def add(a, b):", "max_tokens": 32, "temperature": 0}'

Needs the extra `serve`: pip install 'kwaicoder_jax[serve]'. See docs/serving.md.
"""

import contextlib
import dataclasses
import os
import socket
import sys
import traceback
from typing import Any

from absl import flags

from experiments import command, fields, loading, sections
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import inference
from kwaicoder_jax.errors import UserError

NAME = "serve"
DEFAULTS = dataclasses.asdict(sections.Serve())


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    loading.define_flags()
    flags.DEFINE_string("host", None, f"Address to listen at; {DEFAULTS['host']} unless said otherwise.")
    flags.DEFINE_integer("port", None, f"Port; 0 takes a free one; {DEFAULTS['port']} unless said otherwise.")
    flags.DEFINE_string("model_name", None, "What clients call the model; the folder's name if not given.")
    flags.DEFINE_integer("max_rows", None, "Answers that are worked on together.")
    flags.DEFINE_integer("max_queue", None, "Answers that wait beside them; more are refused with status 429.")
    flags.DEFINE_integer("max_tokens", None, "The longest prompt and answer together.")
    flags.DEFINE_integer("max_body_bytes", None, "The longest request.")
    flags.DEFINE_float("grace_seconds", None, "After SIGTERM, how long running requests may go on.")

    def work(stop: Stop, display: Display) -> None:
        given = {name: flags.FLAGS["checkpoint" if name == "init_from" else name].value for name in DEFAULTS}
        config = command.tool_config(NAME, holder.value, DEFAULTS, given)
        display.stage(NAME)
        fields.check(fields.of_class(sections.Serve), config[NAME], NAME)
        run(config, display, stop)

    command.execute(work, required=(), resumable=False)


def run(config: dict[str, Any], display: Display, stop: Stop) -> None:
    """Serves until a signal comes."""
    section = config[NAME]
    http = _http()
    with contextlib.closing(_listen(section["host"], section["port"])) as listener:
        loaded = loading.load(config, NAME, command.tool_workdir())
        engine = loaded.engine(max_rows=section["max_rows"], max_tokens=section["max_tokens"])
        engine.submit(inference.Request(loaded.begin or (0,), 1))  # what does not work should show before anyone asks
        engine.run()

        def failed(error: BaseException) -> None:
            display.line("the engine failed; requests are refused with status 503 from now on")
            traceback.print_exception(error)

        service = inference.Service(engine, most=section["max_rows"] + section["max_queue"], on_error=failed)
        service.start()
        model = section["model_name"] or loaded.name
        app = http.App(loaded, service, model=model, max_body_bytes=section["max_body_bytes"])
        display.line(f"{model} at http://{_address(listener)}/v1")
        try:
            http.HttpServer(app.asgi, service, section["grace_seconds"]).run([listener])
        finally:
            if not service.close(timeout=http.LAST_WORDS):  # it compiles, which nothing can interrupt
                sys.stderr.flush()
                os._exit(command.stopped_status(stop))


def _http() -> Any:
    """The part that needs the extra."""
    try:
        from experiments import serve_http
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn", "h11"):
            raise
        remedy = "pip install 'kwaicoder_jax[serve]'"
        raise UserError(f"{error.name} is not installed, and serve needs it", remedy=remedy) from error
    return serve_http


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: a port that is taken shows at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        what = f"cannot listen at {host}:{port}: {getattr(error, 'strerror', None) or error}"
        raise UserError(what, where="--port", remedy="choose another --host or --port; 0 takes a free one") from error


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


if __name__ == "__main__":
    main()
