"""A bound on the time of `jax.lax.ragged_dot`, which is a program of XLA's and not one kernel."""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np

from benchmarks.kernel_candidates import Candidate, visits
from benchmarks.kernel_shapes import Case
from kernels.grouped_matmul import Backend
from kwaicoder_jax import hardware
from kwaicoder_jax.hardware import hlo, schedule, work

_KERNEL = "ragged-dot-none"  # what XLA makes of it for TPU, where it does not make it dense


@dataclasses.dataclass(frozen=True)
class Bound:
    """What is known of the compiled program.

    Attributes:
      case: what it computes.
      flops: executed by products; its kernel counts the work that was asked for, not the tiles.
      hbm_bytes: that every instruction reads and writes, once.
      roofline_seconds: these at the peaks of the chip.
      kernel: the one in it; None where it is a dense product over all groups.
    """

    case: Case
    flops: float
    hbm_bytes: float
    roofline_seconds: float
    kernel: schedule.Kernel | None

    def seconds(self, sizes: np.ndarray) -> float:
        """The roofline's time, or the predicted time of its kernel alone if that is longer: it takes no less."""
        if self.kernel is None:
            return self.roofline_seconds
        length = int(self.kernel.operands[2].shape.split("[")[1].rstrip("]"))  # visits, at most
        tile = self.case.rows // (length - len(sizes) + 1)
        found = self.kernel.predict(visits(sizes, self.case.rows, tile, with_empty=False))
        return max(self.roofline_seconds, found.seconds)


def ragged_dot(case: Case, chip: str) -> Bound:
    """Compiles it for the chip."""
    for name, value in hardware.TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    machine = hardware.topology(schedule.tensor_cores(chip).topology, where="--chip")
    here = jax.sharding.SingleDeviceSharding(machine.devices[0])
    candidate = Candidate(Backend.RAGGED_DOT, case)
    arguments = [jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=here) for each in candidate.arguments]
    program = jax.jit(candidate.function).lower(*arguments).compile()
    text, kernel = program.as_text() or "", None
    found = work.measure(hlo.parse(text))
    if _KERNEL in text:
        kernel = schedule.compile_kernel(candidate.function, candidate.arguments, chip=chip, kernel=_KERNEL)
    return Bound(case, found.flops, found.hbm_bytes, machine.chip.seconds(found.flops, found.hbm_bytes), kernel)
