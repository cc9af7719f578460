"""What training does with steps that went wrong: gradients that are not finite, and losses that jump.

A step without a finite gradient changes nothing (`training.step`); too many of them in a row end the run. A loss that is
`factor` times the running median rolls training back to the newest regular checkpoint and leaves out the data in
between, as in PaLM (Chowdhery et al. 2022, section 5.1). All of it is decided from what is saved with each checkpoint,
so that a run that was interrupted decides the same.
"""

import dataclasses
import math
import statistics
from typing import Any

from kwaicoder_jax.errors import UserError


class Diverged(UserError):
    """The loss is no number any more, or jumps again and again."""


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """When a loss counts as a spike.

    Attributes:
      factor: times the median of the losses before it.
      window: number of losses that the median is of; there is no spike before there are so many.
      max_rollbacks: how often a run may roll back; once more ends it.
    """

    factor: float = 2.0
    window: int = 64
    max_rollbacks: int = 10

    def __post_init__(self):
        if not self.factor > 1:
            raise UserError(f"{self.factor} is not above 1", where="spike.factor", remedy="use 1.5, say")
        for name, least in (("window", 1), ("max_rollbacks", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{getattr(self, name)} is less than {least}", where=f"spike.{name}")


@dataclasses.dataclass
class Guard:
    """The memory of one run; `saved` goes into each checkpoint, and a Guard made of it goes on.

    Attributes:
      skipped: steps without a finite gradient so far.
      in_a_row: of these, the last ones, without another between.
      recent: the newest losses, as many as the median is of.
      windows: first and last step of each piece of data that was left out.
      anchor: step of the newest regular checkpoint, to roll back to; 0 is the start.
    """

    max_skipped_steps: int = 10
    spike: SpikeConfig | None = None
    skipped: int = 0
    in_a_row: int = 0
    recent: list[float] = dataclasses.field(default_factory=list)
    windows: list[list[int]] = dataclasses.field(default_factory=list)
    anchor: int = 0

    def saved(self) -> dict[str, Any]:
        """The part that a checkpoint keeps, as JSON."""
        names = ("skipped", "in_a_row", "recent", "windows", "anchor")
        return {name: value for name, value in dataclasses.asdict(self).items() if name in names}

    def is_spike(self, step: int, loss: float, skipped: bool) -> bool:
        """Takes note of one step; whether its loss is a spike. Raises Diverged after too many skipped steps in a row."""
        if skipped:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row >= self.max_skipped_steps:
                raise Diverged(
                    f"{self.in_a_row} steps in a row, the last one step {step}, had no finite gradient",
                    where="phases.*.rate.peak", remedy="lower it, raise the warm-up, or look at the data of these steps",
                )  # fmt: skip
            return False
        self.in_a_row = 0
        if self.spike is None:
            return False
        spike = self.spike
        if len(self.recent) == spike.window and loss > spike.factor * statistics.median(self.recent):
            return True
        self.recent = [*self.recent, float(loss)][-spike.window :] if math.isfinite(loss) else self.recent
        return False

    def roll_back(self, before: dict[str, Any], step: int, loss: float) -> None:
        """Goes back to what the checkpoint to return to had `saved`, and notes the data left out, up to `step`."""
        assert self.spike is not None
        first, windows = self.anchor + 1, self.windows
        if len(windows) >= self.spike.max_rollbacks:
            raise Diverged(
                f"the loss jumped to {loss:.4g} in step {step}, after {len(windows)} roll-backs", where="phases.*.rate.peak",
                remedy="lower it, or raise spike.factor or spike.max_rollbacks",
            )  # fmt: skip
        for name, value in before.items():
            setattr(self, name, value)
        self.windows = [*windows, [first, step]]
