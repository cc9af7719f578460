"""Runs programs that nobody has read: model samples, each in a fresh interpreter, contained and measured.

A Python program passes when it runs to its end, exits with status 0, and the runner around it has then written a
random nonce to a pipe that the program is not told of; `sys.exit(0)` and `os._exit(0)` do not pass. Known escapes, as
the program shares a process with its own tests: to search the open file descriptors for the nonce, to return objects
that equal everything, to change the interpreter under the tests' feet. Linux only.
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from pathlib import Path

from kwaicoder_jax import errors
from kwaicoder_jax.evaluation import outcomes, pipes
from kwaicoder_jax.evaluation.isolation import Isolation, detect
from kwaicoder_jax.evaluation.outcomes import Limits, Outcome

_CHILD = Path(__file__).parent / "child"
# -S: no site-packages. -P -s: no import from odd places. Not -I, which would forget the fixed hash seed below.
PYTHON_FLAGS = ("-P", "-s", "-S", "-B")
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}


class Sandbox:
    """Runs commands and Python programs under limits, as isolated as this machine allows; `isolation` says how far."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        python: str | None = None,
        python_flags: Sequence[str] = PYTHON_FLAGS,
        readable: Sequence[str] = (),
        isolation: Isolation | None = None,
    ):
        """Prepares; finds out once what the machine allows.

        Args:
          limits: for every run, unless a run names its own.
          python: the interpreter; this one's base interpreter (without a virtual environment's packages) by default.
          python_flags: its flags.
          readable: folders that programs may read, besides the system's and the interpreter's.
          isolation: what to use, to skip detection (tests).
        """
        self.limits = limits or Limits()
        self._python = python or _own_interpreter()
        self._python_flags = tuple(python_flags)
        names = (sys.base_prefix, *readable)
        self._readable = tuple(form(name) for name in names for form in (os.path.realpath, os.path.abspath))
        self.isolation = isolation or detect(self._try)

    def run(self, program: str, *, limits: Limits | None = None, files: Mapping[str, str] | None = None) -> Outcome:
        """Runs a Python program to its end.

        Args:
          program: source text, tests included; the module `__main__` of a file main.py.
          limits: other than the sandbox's own.
          files: more files for its folder, by relative name.

        Raises:
          SandboxError: the machine did not let the sandbox start; the program is not to blame.
        """
        return self._run_python(program, self.isolation, limits or self.limits, files or {})

    def run_command(
        self, command: Sequence[str], *, files: Mapping[str, str] | None = None, limits: Limits | None = None
    ) -> Outcome:
        """Runs any command in a fresh folder; "passed" means exit status 0 here, and the caller judges the output.

        Args:
          command: an absolute path and its arguments.
          files: text files of the folder, by relative name.
          limits: other than the sandbox's own.
        """
        return self._run(tuple(command), files or {}, self.isolation, limits or self.limits, ())

    def run_many(self, programs: Iterable[str], workers: int | None = None) -> list[Outcome]:
        """`run` of every program, in their order; `workers` at a time (all cores by default)."""
        with futures.ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
            try:
                return list(pool.map(self.run, programs))
            except BaseException:  # an interrupt waits for the programs that run, not for those that do not yet
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _try(self, isolation: Isolation) -> Outcome:
        return self._run_python("assert 1 + 1 == 2\n", isolation, Limits(), {})

    def _run_python(self, program: str, isolation: Isolation, limits: Limits, files: Mapping[str, str]) -> Outcome:
        nonce = secrets.token_hex(16).encode()
        with pipes.Pipe() as secret, pipes.Pipe() as verdict:
            os.write(secret.write, nonce)
            runner = (_CHILD / "runner.py").read_text()
            command = (self._python, *self._python_flags, "-c", runner, str(secret.read), str(verdict.write))
            keep = (secret.read, verdict.write)
            outcome = self._run(command, {**files, "main.py": program}, isolation, limits, keep)
            verdict.close_write()
            said = pipes.read_available(verdict.read)
        return outcomes.judge(outcome, said, nonce)

    def _run(
        self,
        command: tuple[str, ...],
        files: Mapping[str, str],
        isolation: Isolation,
        limits: Limits,
        keep: tuple[int, ...],
    ) -> Outcome:
        _check_names(files)
        folder = tempfile.mkdtemp(prefix=f"sandbox-{os.getpid()}-")
        try:
            order = _order(command, files, isolation, limits, keep) | {"folder": folder, "readable": self._readable}
            return outcomes.classify(_launch(order, limits), limits)
        finally:
            _remove(folder)


def _check_names(files: Mapping[str, str]) -> None:
    for name in files:
        if os.path.isabs(name) or ".." in Path(name).parts or not name:
            raise errors.UserError(f"file {name!r}", where="sandbox", remedy="use a relative name inside the folder")


def _order(
    command: tuple[str, ...], files: Mapping[str, str], isolation: Isolation, limits: Limits, keep: tuple[int, ...]
) -> dict:
    """The launcher's order, less what is made for one run."""
    rlimits = {
        "RLIMIT_CPU": math.ceil(limits.cpu_seconds) + 1,  # behind the supervisor's own, finer count
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": limits.processes,
        "RLIMIT_CORE": 0,
    }
    if limits.address_space:
        rlimits["RLIMIT_AS"] = limits.memory_bytes
    return {
        "command": command,
        "files": dict(files),
        "keep": keep,
        "environment": ENVIRONMENT,
        "namespaces": isolation.namespaces,
        "user": isolation.user,
        "parent": os.getpid(),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "disk_bytes": limits.disk_bytes,
        "rlimits": rlimits,
    }


def _launch(order: dict, limits: Limits) -> pipes.Observed:
    streams = {name: pipes.Pipe() for name in ("report", "out", "err")}
    with contextlib.ExitStack() as stack:
        for pipe in streams.values():
            stack.enter_context(pipe)
        leash = stack.enter_context(pipes.Pipe())
        file = stack.enter_context(tempfile.TemporaryFile())
        ends = {"leash": leash.read, **{name: pipe.write for name, pipe in streams.items()}}
        file.write(json.dumps(order | ends).encode())
        file.seek(0)
        process = subprocess.Popen(
            [_own_interpreter(), "-I", "-S", "-B", str(_CHILD / "launcher.py")],
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=[*ends.values(), *order["keep"]],
        )
        return pipes.follow(process, leash, streams, limits.wall_seconds, limits.output_bytes)


def _own_interpreter() -> str:
    """This interpreter without its virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _remove(folder: str) -> None:
    """Removes the folder, including folders that the program made unreadable."""

    def open_up(_: object, place: str, __: object) -> None:
        with contextlib.suppress(OSError):
            os.chmod(os.path.dirname(place), 0o700)
            if not os.path.islink(place):
                os.chmod(place, 0o700)
        if os.path.isdir(place) and not os.path.islink(place):
            shutil.rmtree(place, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(place)

    shutil.rmtree(folder, onerror=open_up)
    shutil.rmtree(folder, ignore_errors=True)
