"""What the command's processes used, read from /proc, and their end.

Inside a PID namespace /proc shows the command's processes and the supervisor, nothing else; outside, the supervisor
looks at its descendants. Times are seconds, memory is bytes. A process that starts and ends between two looks is
counted when its parent waits for it; one whose parent ignores SIGCHLD escapes the sum, not the wall clock.
"""

import os
import resource
import signal
import time

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _stat(process: int) -> "list[str]":
    """Fields of /proc/PID/stat after the name: state, parent, ...; empty when it is gone or hidden."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return []


def descendants() -> "dict[int, list[str]]":
    """Every living descendant of the caller, with its fields."""
    try:
        found = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdigit()}
    except OSError:
        return {}
    result: dict[int, list[str]] = {}
    frontier = {os.getpid()}
    while frontier:
        children = {pid for pid, fields in found.items() if fields and int(fields[1]) in frontier and pid not in result}
        result.update((pid, found[pid]) for pid in children)
        frontier = children
    return result


def cpu_of_living() -> float:
    """CPU seconds of all descendants and of the children that they waited for."""
    return sum(sum(int(field) for field in fields[11:15]) for fields in descendants().values()) / _TICKS


def cpu_of_dead() -> float:
    """CPU seconds of the children that the caller waited for, theirs included."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def over_limit(cpu_seconds: float, memory_bytes: int) -> "str | None":
    """Which limit all descendants together have passed: "cpu", "memory" (resident, shared pages twice), or None."""
    alive = descendants()
    if sum(int(fields[21]) for fields in alive.values()) * _PAGE > memory_bytes:
        return "memory"
    cpu = sum(sum(int(field) for field in fields[11:15]) for fields in alive.values()) / _TICKS
    return "cpu" if cpu + cpu_of_dead() > cpu_seconds else None


def reap(child: int) -> "int | None":
    """Waits for all children that ended; the exit code of `child` (minus the signal's number), or None if it runs."""
    result = None
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return result
        if process == 0:
            return result
        if process == child:
            result = os.waitstatus_to_exitcode(status)


def threads_of_user(user: int) -> int:
    """Threads that the user has on this machine."""
    count = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                count += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return count


def kill_descendants(seconds: float = 5.0) -> None:
    """SIGKILL to all descendants, again and again until none is left; they are the caller's as it adopts orphans."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = descendants()
        for process in alive:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap(0)
        if not alive:
            return
