"""Which walls this machine can put around a program: tried, not guessed."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

NOBODY = 65534


class SandboxError(RuntimeError):
    """The machine did not let a sandbox start, or a command could not be executed; no program was judged."""


class _HasStatus(Protocol):
    @property
    def status(self) -> str: ...
    @property
    def detail(self) -> str: ...


@dataclass(frozen=True)
class Isolation:
    """How programs are contained.

    Attributes:
      namespaces: user, network, PID, mount and IPC namespaces, all of them or none.
      user: an unprivileged user id for programs when root runs the sandbox (without namespaces, every run gets another
        one); None keeps the caller's.
      missing: why stronger isolation was not available, one line each.
    """

    namespaces: bool
    user: int | None
    missing: tuple[str, ...] = ()

    @property
    def report(self) -> list[str]:
        """What is active and what is not, one line a layer."""
        lines = [
            "active: own session, resource limits, scrubbed environment, capped output, all processes killed at the end"
        ]
        if self.namespaces:
            lines += [
                "active: no network (network namespace)",
                "active: no other process visible, daemons die too (PID namespace)",
                "active: system folders read-only, no home, one small writable folder (mount namespace)",
                "active: process limit per program (user namespace)",
            ]
        else:
            lines += [
                "missing: the network can be reached",
                "missing: files that the user may read or write can be read or written",
                "missing: other processes of the same user can be signalled",
            ]
            if self.user is None:
                lines.append("missing: the process limit is shared with the user's other processes")
        if self.user is not None:
            lines.append(f"active: unprivileged user ({self.user})")
        return lines + [f"missing: {line}" for line in self.missing]


def candidates() -> list[Isolation]:
    """Ways to contain, strongest first, for the current user. Root runs nothing as root unless told to explicitly."""
    if os.geteuid() != 0:
        return [Isolation(True, None), Isolation(False, None)]
    return [Isolation(True, NOBODY), Isolation(False, NOBODY)]


def detect(attempt: Callable[[Isolation], _HasStatus]) -> Isolation:
    """The strongest isolation under which `attempt`, a trivial program, passes.

    Raises:
      SandboxError: none works.
    """
    missing: list[str] = []
    for candidate in candidates():
        try:
            outcome = attempt(candidate)
        except SandboxError as error:
            reason = str(error)
        else:
            if outcome.status == "passed":
                return Isolation(candidate.namespaces, candidate.user, tuple(missing))
            reason = f"{outcome.status}: {outcome.detail}"
        missing.append(f"namespaces={candidate.namespaces}, user={candidate.user}: {reason}")
    remedy = "use a kernel with user namespaces, or an interpreter that an unprivileged user can read"
    raise SandboxError(f"no program can be run safely: {'; '.join(missing)}; {remedy}")
