"""What the TensorCores of a chip do in a cycle."""

import dataclasses

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware.chips import Chip, chip


@dataclasses.dataclass(frozen=True)
class TensorCores:
    """The TensorCores of one chip.

    Attributes:
      chip: of the chip table.
      device_kind: as jax calls the chip.
      topology: the smallest machine of it that the compiler knows.
      count: TensorCores of a chip.
      macs_per_cycle: bf16 multiply-adds that the matrix units of one core do in a cycle.
      vmatmul_cycles: that one vmatmul instruction occupies its matrix unit: 16 rows of bf16.
      hbm_step: bytes from one address in HBM to the next, as its programs count them.
    """

    chip: Chip
    device_kind: str
    topology: str
    count: int
    macs_per_cycle: int
    vmatmul_cycles: int
    hbm_step: int

    @property
    def clock(self) -> float:
        """Cycles per second: the published peak over the multiply-adds of a cycle."""
        return self.chip.bf16_flops / (2 * self.macs_per_cycle * self.count)

    def hbm_bytes_per_cycle(self, working: int) -> float:
        """Of one of the cores, when so many of them share the chip's memory."""
        return self.chip.hbm_bandwidth / self.clock / working


# cloud.google.com/tpu/docs, system architecture: v5e and v5p have 4 matrix units of 128 x 128 in a core, v6e has 2 of
# 256 x 256, whose published peak is that of two rows a cycle at the clock of v5p.
_CORES = {
    cores.chip.name: cores
    for cores in (
        TensorCores(chip("v5e"), "TPU v5 lite", "v5e:2x2", 1, 4 * 128 * 128, 16, 512),
        TensorCores(chip("v5p"), "TPU v5", "v5p:2x2x1", 2, 4 * 128 * 128, 16, 32),
        TensorCores(chip("v6e"), "TPU v6 lite", "v6e:2x2", 1, 2 * 2 * 256 * 256, 8, 32),
    )
}


def tensor_cores(name: str, where: str = "chip") -> TensorCores:
    """Of the chip called `name`; UserError, at the config field `where`, if it has none that are known here."""
    if name not in _CORES:
        raise UserError(f"no TensorCores are known of {name!r}", where=where, remedy=f"use {', '.join(_CORES)}")
    return _CORES[name]
