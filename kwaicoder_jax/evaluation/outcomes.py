"""What a run may use and how it ended, in words that do not depend on the machine."""

import signal
from dataclasses import dataclass
from typing import Literal

from kwaicoder_jax.evaluation.isolation import SandboxError
from kwaicoder_jax.evaluation.pipes import Observed

Status = Literal["passed", "failed", "timeout", "memory", "output", "crashed"]


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
      cpu_seconds: CPU time of all its processes together; the limit that decides, since it does not depend on load.
      wall_seconds: time on the clock; generous, for programs that sleep.
      memory_bytes: resident memory of all its processes together, and the address space of each.
      address_space: False lifts the limit on address space (a JVM reserves far more than it uses).
      file_bytes: size of one file.
      disk_bytes: all its files together (where it has a root of its own).
      open_files: file descriptors of a process.
      processes: processes and threads together.
      output_bytes: standard output and error together; more ends the program.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 60.0
    memory_bytes: int = 1 << 30
    address_space: bool = True
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    open_files: int = 256
    processes: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
      status: "passed"; "failed" (wrong, or ended without passing); "timeout" (CPU or clock); "memory"; "output" (too
        much of it); "crashed" (a signal).
      detail: one line for people.
      seconds: on the clock, from the program's start.
      cpu_seconds: of all its processes.
      output: standard output, at most Limits.output_bytes.
      errors: standard error, the same.
      exit_code: minus the signal's number when one ended it; None when a limit did.
    """

    status: Status
    detail: str
    seconds: float
    cpu_seconds: float
    output: str
    errors: str
    exit_code: int | None


def classify(seen: Observed, limits: Limits) -> Outcome:
    """The outcome of a command by its exit status and the limits it met.

    Raises:
      SandboxError: the command was never started.
    """
    report: dict = {}
    for line in seen.reports:
        report |= line
    if "error" in report:
        raise SandboxError(report["error"])
    if "started" not in report or seen.ended_for == "start":
        raise SandboxError("the launcher did not start the command")
    status, detail = _status(report, seen.ended_for, limits)
    out, err = (bytes(seen.kept[name]).decode("utf-8", "replace") for name in ("out", "err"))
    seconds, cpu = report.get("seconds", seen.seconds), report.get("cpu_seconds", 0.0)
    return Outcome(status, detail, seconds, cpu, out, err, report.get("exit"))


def _status(report: dict, ended_for: str, limits: Limits) -> tuple[Status, str]:
    code, limit = report.get("exit"), report.get("limit")
    if ended_for == "output":
        return "output", f"more than {limits.output_bytes} bytes of output"
    if limit == "cpu" or code == -signal.SIGXCPU:
        return "timeout", f"more than {limits.cpu_seconds} s of CPU time"
    if limit == "memory":
        return "memory", f"more than {limits.memory_bytes} bytes resident"
    if report.get("cpu_seconds", 0.0) > limits.cpu_seconds:  # it ended between two looks of the supervisor
        return "timeout", f"more than {limits.cpu_seconds} s of CPU time"
    if code is None and ended_for == "wall":
        return "timeout", f"more than {limits.wall_seconds} s on the clock"
    if code is None:
        return "crashed", "its supervisor was killed"
    if code < 0:
        return "crashed", signal.strsignal(-code) or f"signal {-code}"
    return ("passed", "") if code == 0 else ("failed", f"exit status {code}")


def judge(outcome: Outcome, said: bytes, nonce: bytes) -> Outcome:
    """The outcome of the process, seen together with what the runner said."""
    values = dict(vars(outcome))
    if outcome.status == "passed" and said != nonce:
        values.update(status="failed", detail="exit status 0, but the program did not run to its end")
    elif outcome.status == "failed" and said[:1] in (b"E", b"M"):
        values.update(status="memory" if said[:1] == b"M" else "failed", detail=said[1:400].decode("utf-8", "replace"))
    return Outcome(**values)
