"""Runs one command in isolation: reads an order (JSON) from standard input, reports (JSON lines) on a pipe.

    launcher            host side of the new user namespace; ends when the supervisor ends
      supervisor        process 1 of the new PID namespace: builds the root, starts the command, counts
        command         unprivileged, limited; with the supervisor's end the kernel kills all that is left of it

Without namespaces the launcher is itself the supervisor, adopts orphans and kills them one by one.
The parent holds the other end of the leash: when it lets go, wanted or killed, the supervisor ends everything.
"""

import json
import os
import resource
import select
import signal
import sys
import time

# A bare interpreter that was given this file's path knows nothing else of ours.
sys.path.append(os.path.abspath(os.path.join(os.path.dirname(__file__), *[".."] * 3)))
from kwaicoder_jax.evaluation.child import newroot, processes, system

INSIDE_ID = 1000
# Without namespaces every run gets a user of its own, because the kernel counts processes by user.
FIRST_SPARE_ID, SPARE_IDS = 60_100, 5_000
TICK = {True: 0.05, False: 0.2}  # seconds between two looks at all processes; without namespaces /proc is the machine's


def main() -> None:
    """The launcher's life."""
    with os.fdopen(os.dup(0)) as file:
        order = json.load(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in ("leash", "report", "out", "err"):
        os.set_inheritable(order[name], False)
    try:
        if not order["namespaces"]:
            # here this process must outlive its parent, to kill the orphans that it adopts; the leash tells it when
            if order["user"] is not None:
                order["user"] = FIRST_SPARE_ID + os.getpid() % SPARE_IDS
            system.adopt_orphans()
            supervise(order)
            return
        _survive_nobody(order["parent"])
        _enter_namespaces(order)
        supervisor = os.fork()
        if supervisor == 0:
            system.die_with_parent()
            _reported(order, lambda: supervise(order))
        os.close(order["report"])  # so that the parent sees its end with the supervisor's
        os.waitpid(supervisor, 0)
    except Exception as error:
        _report(order, {"error": f"{type(error).__name__}: {error}"})


def _reported(order: dict, action) -> None:
    """Runs `action` in a forked process and ends it, with an exception told to the parent."""
    try:
        action()
    except BaseException as error:
        _report(order, {"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)


def _report(order: dict, value: dict) -> None:
    os.write(order["report"], json.dumps(value).encode() + b"\n")


def _survive_nobody(parent: int) -> None:
    system.die_with_parent()
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _enter_namespaces(order: dict) -> None:
    """New namespaces, with the command's user mapped: to an unprivileged one for root, else to the caller."""
    user, group, me = os.geteuid(), os.getegid(), os.getpid()
    users, groups = f"{INSIDE_ID} {user} 1\n", f"{INSIDE_ID} {group} 1\n"
    if user == 0:
        users, groups = (f"0 0 1\n{INSIDE_ID} {order['user']} 1\n",) * 2
    ready_r, ready_w = os.pipe()
    helper = os.fork()
    if helper == 0:  # stays outside, because only there the maps may be written
        os.close(ready_w)
        os.read(ready_r, 1)
        _reported(order, lambda: _write_maps(me, users, groups, deny_setgroups=user != 0))
    system.unshare(system.NEW_USER | system.NEW_MOUNTS | system.NEW_PIDS | system.NEW_NET | system.NEW_IPC)
    os.close(ready_r)
    os.close(ready_w)
    os.waitpid(helper, 0)
    system.die_with_parent()


def _write_maps(process: int, users: str, groups: str, *, deny_setgroups: bool) -> None:
    texts = {"uid_map": users, "setgroups": "deny", "gid_map": groups}
    if not deny_setgroups:
        del texts["setgroups"]
    for name, text in texts.items():
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def supervise(order: dict) -> None:
    """Starts the command, waits for its end or a limit, kills what is left, reports."""
    system.hide_memory()
    wake_r, wake_w = os.pipe()
    os.set_blocking(wake_w, False)
    signal.set_wakeup_fd(wake_w)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that Python handles, and a program could send
    folder = newroot.enter(order) if order["namespaces"] else order["folder"]
    newroot.write_files(folder, order["files"], _owner(order))
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _reported(order, lambda: _become_command(order, folder))
    _report(order, {"started": True})
    ended, limit = None, None
    while ended is None and limit is None:
        readable, _, _ = select.select([order["leash"], wake_r], [], [], TICK[order["namespaces"]])
        if order["leash"] in readable:
            limit = "stopped"
            break
        if wake_r in readable:
            os.read(wake_r, 4096)
        ended = processes.reap(child)
        limit = processes.over_limit(order["cpu_seconds"], order["memory_bytes"]) if ended is None else None
    cpu = processes.cpu_of_living() + processes.cpu_of_dead()
    result = {"exit": ended, "limit": limit, "cpu_seconds": cpu, "seconds": time.monotonic() - started}
    if not order["namespaces"]:
        processes.kill_descendants()
    _report(order, result)


def _owner(order: dict) -> "tuple[int, int] | None":
    """User and group id that own the working folder, None when the supervisor's own do."""
    if os.geteuid() != 0 or order["user"] is None:
        return None
    return (INSIDE_ID, INSIDE_ID) if order["namespaces"] else (order["user"], order["user"])


def _become_command(order: dict, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    _drop_rights(order)
    for stream, descriptor in enumerate((0, order["out"], order["err"])):
        os.dup2(descriptor, stream)
    for descriptor in order["keep"]:
        os.set_inheritable(descriptor, True)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    environment = dict(order["environment"], HOME=folder, TMPDIR=folder, PWD=folder)
    os.execve(order["command"][0], order["command"], environment)


def _drop_rights(order: dict) -> None:
    """Resource limits, then the user id, then no way back."""
    limits = {name: (value, value) for name, value in order["rlimits"].items()}
    if "RLIMIT_NPROC" in limits and os.geteuid() != 0 and not order["namespaces"]:
        # the kernel counts every thread of this user on the machine
        count = order["rlimits"]["RLIMIT_NPROC"] + processes.threads_of_user(os.geteuid())
        limits["RLIMIT_NPROC"] = (count, count)
    if "RLIMIT_CPU" in limits:
        seconds = order["rlimits"]["RLIMIT_CPU"]
        limits["RLIMIT_CPU"] = (seconds, seconds + 1)
    owner = _owner(order)
    for name, pair in limits.items():
        hard = resource.getrlimit(getattr(resource, name))[1]
        low = [value if hard == resource.RLIM_INFINITY else min(value, hard) for value in pair]
        resource.setrlimit(getattr(resource, name), (low[0], low[1]))
    if owner:
        os.setgroups([])
        os.setresgid(owner[1], owner[1], owner[1])
        os.setresuid(owner[0], owner[0], owner[0])
    system.no_new_privileges()
    system.die_with_parent()


if __name__ == "__main__":
    main()
