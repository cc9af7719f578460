"""The chip table: peak arithmetic and memory bandwidth, as the makers publish them."""

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
    """

    name: str
    bf16_flops: float
    hbm_bandwidth: float
    hbm_bytes: float

    def seconds(self, flops: float, hbm_bytes: float) -> float:
        """The roofline's time: the longer of arithmetic at its peak and memory traffic at full bandwidth.

        A lower bound: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
        """
        return max(flops / self.bf16_flops, hbm_bytes / self.hbm_bandwidth)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 819e9, 16e9),
        Chip("v5p", 459e12, 2765e9, 95 * 2**30),
        Chip("v6e", 918e12, 1640e9, 32e9),
        Chip("h100", 989e12, 3350e9, 80e9),
    )
}


def chip(name: str, where: str = "chip") -> Chip:
    """The chip called `name`; UserError, at the config field `where`, if there is none."""
    if name not in CHIPS:
        raise UserError(f"no chip {name!r}", where=where, remedy=f"use {', '.join(CHIPS)}")
    return CHIPS[name]
