"""The chip table and its roofline."""

import pytest

from kwaicoder_jax import hardware
from kwaicoder_jax.errors import UserError


def test_the_roofline_is_the_longer_of_both():
    chip = hardware.chip("v5e")
    assert chip.seconds(197e12, 0.0) == 1.0
    assert chip.seconds(1.0, 819e9 / 2) == 0.5
    assert chip.seconds(197e12, 819e9 * 2) == 2.0


def test_peaks_are_the_published_ones_and_unknown_chips_are_named():
    assert {name: round(c.bf16_flops / 1e12) for name, c in hardware.CHIPS.items()} == {
        "v5e": 197, "v5p": 459, "v6e": 918, "h100": 989,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"prune\.search\.chip: no chip 'v4'.*v5e, v5p, v6e, h100"):
        hardware.chip("v4", "prune.search.chip")
