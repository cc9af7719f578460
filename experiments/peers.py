"""Several processes that run one command together: joining, telling one another, and leaving.

One process leads: it alone writes what there is one of. What it decides, it tells the others. A process that leaves
before the end says so, and the others leave with the same exit status; one that was killed is missed.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from experiments.stopping import Stop, Stopped
from kwaicoder_jax.errors import UserError

LOST = 3  # exit status: a peer was lost, or no step ended in time
HEAR_MILLISECONDS = 1000
# For those who have heard to be gone: JAX aborts a process whose coordination service ends before it does.
GONE_SECONDS = 2.0
GRACE_SECONDS = 5.0  # for the main thread to leave by itself, before the process is ended


class PeerLeft(Exception):
    """Another process left before the end, and why; this one ends with the same status."""

    def __init__(self, text: str, status: int):
        self.text, self.status = text, status
        super().__init__(text)


class Alone:
    """The only process of a run."""

    index, count = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.index == 0

    def tell(self, name: str, value: Any) -> None:
        """Tells the others."""

    def hear(self, name: str) -> Any:
        """Waits for what the leader tells under a name."""
        raise ValueError(f"nobody tells {name}")

    def describe(self) -> str:
        """The process, for a person."""
        return f"process {self.index} of {self.count} on {socket.gethostname()}, pid {os.getpid()}"

    def note(self, kind: str, value: Any) -> None:
        """Writes down something of this process for the others, over what it noted before."""

    def notes(self, kind: str) -> dict[int, Any]:
        """What the processes have noted, by process."""
        return {}


class Joined(Alone):
    """One of several processes; notes go through JAX's coordination service, which process 0 runs."""

    def __init__(self, client: Any, index: int, count: int):
        self._client, self.index, self.count = client, index, count

    def tell(self, name: str, value: Any) -> None:
        """Tells the others; a name is used once."""
        self._client.key_value_set(f"told/{name}", json.dumps(value))

    def hear(self, name: str) -> Any:
        """Waits for what the leader tells under a name; whoever misses it is ended by the watch over the peers."""
        while True:
            try:
                # Not for long at a time: a signal is handled in between.
                return json.loads(self._client.blocking_key_value_get(f"told/{name}", HEAR_MILLISECONDS))
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def note(self, kind: str, value: Any) -> None:
        self._client.key_value_set(f"{kind}/{self.index}", json.dumps(value), allow_overwrite=True)

    def notes(self, kind: str) -> dict[int, Any]:
        found = self._client.key_value_dir_get(f"{kind}/")
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}


@contextlib.contextmanager
def joined(settings: dict[str, Any], stop: Stop) -> Iterator[Alone]:
    """Joins the processes that `settings` describe, and leaves them together at the end.

    Args:
      settings: distributed (find the others by what a TPU pod, Slurm or Kubernetes says), or coordinator,
        num_processes and process_id.
      stop: whether this process was asked to stop.

    Raises:
      UserError: settings that do not go together, or a coordinator that does not answer.
    """
    if not settings["distributed"] and settings["coordinator"] is None:
        for name in ("num_processes", "process_id"):
            if settings[name] is not None:
                raise UserError("goes with --coordinator", where=f"--{name}", remedy="give it, as in host:1234")
        yield Alone()
        return
    peers = _join(settings)
    stop.install()  # JAX may have taken over SIGTERM
    stop.leave = lambda: leave(peers, None, "was asked to stop")
    try:
        yield peers
    except Exception as error:
        if (before := _left(peers)) is None:
            leave(peers, *_reason(error, peers))
            raise
        with contextlib.suppress(Exception):
            peers.note("heard", True)
        if before["status"] is None:
            raise Stopped from error  # it stopped, and what failed here is that it was gone
        raise PeerLeft(before["text"], before["status"]) from error
    except BaseException:
        stop.leave()
        raise
    stop.leave = None
    import jax

    jax.distributed.shutdown()  # waits for the others


def _join(settings: dict[str, Any]) -> Joined:
    import jax
    from jax._src import distributed

    known = {"coordinator_address": settings["coordinator"]}
    known |= {name: settings[name] for name in ("num_processes", "process_id")}
    missing = [name for name, value in known.items() if value is None]
    if not settings["distributed"] and missing:
        raise UserError("is missing", where=f"--{missing[0]}", remedy="give it, or --distributed on a cluster")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
    try:
        jax.distributed.initialize(
            **known, initialization_timeout=settings["join_seconds"],
            heartbeat_timeout_seconds=max(10, 2 * settings["peer_seconds"]), shutdown_timeout_seconds=60,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        what = str(error).splitlines()[0]
        where, remedy = "--coordinator", "start all processes within --join_seconds, each with its own --process_id"
        raise UserError(f"the processes do not find one another: {what}", where=where, remedy=remedy) from error
    # The service's notes have no public interface; multihost_utils reaches for the client in the same way.
    return Joined(distributed.global_state.client, jax.process_index(), jax.process_count())


def _reason(error: BaseException, peers: Alone) -> tuple[int | None, str, int]:
    """With what the others should leave (None for the status of a stop), why, and how many of them are lost."""
    if isinstance(error, UserError):
        return 2, f"ends: {' '.join(str(error).split())}", 0
    if isinstance(error, OSError):
        return 2, f"ends: {error.filename or ''} {error.strerror}", 0
    silent = _silent(peers)
    lost = "".join(f"; {name} gives no sign of life" for name in silent.values())
    return LOST, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}{lost}", len(silent)


def _left(peers: Alone) -> dict[str, Any] | None:
    """What the first of the other processes said that left."""
    with contextlib.suppress(Exception):
        return next((note for number, note in peers.notes("left").items() if number != peers.index), None)
    return None


def _silent(peers: Alone) -> dict[int, str]:
    """The peers whose watch says nothing any more, by number."""
    with contextlib.suppress(Exception):
        before = peers.notes("alive")
        time.sleep(3.0)
        after = peers.notes("alive")
        return {
            number: sign[1] for number, sign in before.items() if after.get(number) == sign and number != peers.index
        }
    return {0: "process 0"}


def leave(peers: Alone, status: int | None, why: str, lost: int = 0) -> None:
    """Tells the others that this process ends now, and why; gives them time to hear it. Only the first one counts.

    `lost` of them cannot hear it any more.
    """
    with contextlib.suppress(Exception):
        if not peers.notes("left"):
            peers.note("left", {"status": status, "text": f"{peers.describe()} {why}"})
        peers.note("heard", True)
        if peers.leads:  # the notes end with this process
            deadline = time.monotonic() + GRACE_SECONDS + 3.0
            while len(peers.notes("heard")) < peers.count - lost and time.monotonic() < deadline:
                time.sleep(0.1)
            time.sleep(GONE_SECONDS)


def end(status: int) -> None:
    """Ends this process at once, whatever its threads are in."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
