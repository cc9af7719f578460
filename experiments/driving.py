"""A train loop inside a command: progress, signals, the watch, and one-line errors."""

from typing import Any

import jax

from experiments.contract import Context
from experiments.stopping import Stopped
from kwaicoder_jax import hardware, training
from kwaicoder_jax.errors import UserError


def drive(context: Context, loop: training.Loop, label: str = "") -> training.TrainState:
    """Runs the loop to its end, and closes its store.

    Raises:
      Stopped: the process was asked to stop, and everything is saved.
      UserError: training diverged; it names the config field.
    """
    stop, watch, note = context.stop, context.watch, _Note(label)
    with stop.deferred(), watch.armed(), context.display.progress(loop.config.steps, "steps") as update:

        def on_step(step: int) -> None:
            watch.finished(step)
            update(step, note.text)

        def on_phase(phase: str, unsaved: bool) -> None:
            watch.at(phase)
            stop.idle(not unsaved)

        loop.profile, loop.peak_flops = context.profile, peak_flops()

        def stop_requested() -> bool:  # asked after each step and each batch of an evaluation
            watch.beat()
            return stop.requested

        loop.stop_requested = stop_requested
        loop.on_record, loop.on_step, loop.on_phase = note.record, on_step, on_phase
        loop.on_warning = context.display.line
        try:
            return loop.run()
        except training.Preempted:
            raise Stopped from None
        except training.Diverged as error:
            where = f"{context.stage.name}.{error.where}"
            raise UserError(error.what, where=where, remedy=error.remedy) from error
        finally:
            loop.store.close()


def peak_flops() -> float | None:
    """Of all devices of the run, where they are in the chip table."""
    devices = jax.devices()
    chip = hardware.chip_of(devices[0].device_kind)
    return None if chip is None else chip.bf16_flops * len(devices)


class _Note:
    """The text beside the progress bar: the newest losses."""

    def __init__(self, label: str):
        self.text, self._label = label, label
        self._parts: dict[str, str] = {}

    def record(self, record: dict[str, Any]) -> None:
        for key, short in (("loss", "loss"), ("valid_loss", "valid"), ("tokens_per_second", "tokens/s")):
            if key in record:
                self._parts[short] = f"{short} {record[key]:.0f}" if "/s" in short else f"{short} {record[key]:.3f}"
        self.text = " ".join(filter(None, [self._label, ", ".join(self._parts.values())]))
