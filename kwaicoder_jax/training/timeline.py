"""Where the time of a run went, over all the processes that worked on it.

STAGE/timeline.jsonl    appended only: when each process started, what it had spent on what at each record, its end
"""

import json
import time
from typing import Any

from etils import epath

from kwaicoder_jax import files

START, MARK, END = "start", "mark", "end"
# What else than steps a process does, as the summary says it.
PHASES = {
    "input": "seconds_input", "save": "seconds_saving", "compile": "seconds_compiling", "restore": "seconds_restoring",
    "evaluate": "seconds_evaluating", "rollback": "seconds_rolling_back",
}  # fmt: skip


class Timeline:
    """Appends what happens; `folder` is the stage's."""

    def __init__(self, folder: Any):
        self.file = epath.Path(folder) / "timeline.jsonl"

    def note(self, kind: str, step: int, seconds: dict[str, float], at: float | None = None) -> None:
        """One event: START, MARK (the step is done) or END, and the seconds by phase of this process so far."""
        event = {"kind": kind, "at": time.time() if at is None else at, "step": step, "seconds": seconds}
        begin = "\n" if kind == START else ""  # behind what a full disk or a kill may have cut short
        files.append_text(self.file, begin + json.dumps(event) + "\n")


def read(folder: Any) -> list[dict[str, Any]]:
    """The events; a line that a crash cut short is left out."""
    file = epath.Path(folder) / "timeline.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def summarise(events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds from the first start to the end: by phase, and lost to restarts; `goodput` is the share of steps in them.

    What an interrupted process did after the step that the next one went on from counts as lost, and so does the time
    in which no process ran. What is not known any more counts as lost too.
    """
    starts = [number for number, event in enumerate(events) if event["kind"] == START]
    if not starts or starts[0] != 0 or events[-1]["kind"] == START:
        return {}
    parts = [events[start:stop] for start, stop in zip(starts, [*starts[1:], len(events)])]
    restored = [part[0]["step"] for part in parts[1:]] + [events[-1]["step"]]
    total, known = events[-1]["at"] - events[0]["at"], 0.0
    spent: dict[str, float] = {}
    for number, part in enumerate(parts):
        # What later processes went back behind does not count either.
        counted = [event for event in part if event["step"] <= min(restored[number:])][-1]
        known += counted["at"] - part[0]["at"]
        for phase, seconds in counted["seconds"].items():
            spent[phase] = spent.get(phase, 0.0) + seconds - part[0]["seconds"].get(phase, 0.0)
    summary = {"seconds_total": total, "seconds_lost_to_restarts": total - known, "restarts": len(parts) - 1}
    summary |= {key: spent.get(phase, 0.0) for phase, key in PHASES.items()}
    summary["goodput"] = spent.get("step", 0.0) / total if total > 0 else 0.0
    return {key: round(value, 4) for key, value in summary.items()}
