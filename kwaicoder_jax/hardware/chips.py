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
    """

    name: str
    bf16_flops: float
    hbm_bandwidth: float
    hbm_bytes: float
    link_bandwidth: float = 0.0
    torus_axes: int = 0
    network_bandwidth: float = 0.0

    def seconds(self, flops: float, hbm_bytes: float) -> float:
        """The roofline's time: the longer of arithmetic at its peak and memory traffic at full bandwidth.

        A lower bound: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
        """
        return max(flops / self.bf16_flops, hbm_bytes / self.hbm_bandwidth)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, 819e9, 16e9, 200e9, 2),
        Chip("v5p", 459e12, 2765e9, 95 * 2**30, 600e9, 3),
        Chip("v6e", 918e12, 1640e9, 32e9, 448e9, 2),
        Chip("h100", 989e12, 3350e9, 80e9, 450e9, 0, 50e9),
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
