"""The chip table: peak arithmetic, memory and links, as the makers publish them."""

import dataclasses

from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as in a config.
      bf16_flops: peak of dense bf16 products, FLOP per second.
      hbm_bandwidth: bytes per second.
      hbm_bytes: memory.
      link_bandwidth: bytes per second that it sends to its neighbours, over all links together.
      torus_axes: over how many axes of a torus those links are spread; 0 for a switch.
      network_bandwidth: bytes per second that it sends to another host, where that goes another way.
      int8_flops: as bf16_flops, of products of int8 with int8; 0 where they are no faster.
      fp8_flops: the same of 8-bit floats.
    """

    name: str
    bf16_flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    network_bandwidth: float = 0.0
    int8_flops: float = 0.0
    fp8_flops: float = 0.0

    def peak(self, dtype: str) -> float:
        """Of products whose operands both have this type, as HLO names it: "s8", "f8e4m3fn", "bf16"."""
        special = self.int8_flops if dtype in ("s8", "u8") else self.fp8_flops if dtype.startswith("f8") else 0.0
        return special or self.bf16_flops

    def seconds(self, flops: float, hbm_bytes: float) -> float:
        """The roofline's time: the longer of arithmetic at its peak and memory traffic at full bandwidth.

        A lower bound: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
        """
        return max(flops / self.bf16_flops, hbm_bytes / self.hbm_bandwidth)


# 8 bits: cloud.google.com/tpu/docs, "Peak compute per chip (Int8)" of v5e (393), v5p (918) and v6e (1836 TOPS); none of them
# multiplies 8-bit floats. NVIDIA's H100 data sheet, SXM, half of the figures with sparsity.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 819e9, 16e9, 200e9, 2, int8_flops=393e12),
        Chip("v5p", 459e12, 2765e9, 95 * 2**30, 600e9, 3, int8_flops=918e12),
        Chip("v6e", 918e12, 1640e9, 32e9, 448e9, 2, int8_flops=1836e12),
        Chip("h100", 989e12, 3350e9, 80e9, 450e9, 0, 50e9, int8_flops=1979e12, fp8_flops=1979e12),
    )
}


# Parts of what jax calls a device (device_kind), the longer ones first.
_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "v5p": "v5p", "v5": "v5p", "h100": "h100"}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls so, as in "TPU v5 lite"; None for one that is not in the table."""
    kind = device_kind.lower()
    name = next((name for part, name in _KINDS.items() if part in kind), None)
    return None if name is None else CHIPS[name]


def chip(name: str, where: str = "chip") -> Chip:
    """The chip called `name`; UserError, at the config field `where`, if there is none."""
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}", where=where, remedy=f"use {', '.join(CHIPS)}")
    return CHIPS[name]
