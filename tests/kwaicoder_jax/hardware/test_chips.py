"""The chip table and its roofline."""

import types

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
    assert {name: (round(c.peak("s8") / 1e12), round(c.peak("f8e4m3fn") / 1e12)) for name, c in hardware.CHIPS.items()} == {
        "v5e": (393, 197), "v5p": (918, 459), "v6e": (1836, 918), "h100": (1979, 1979),
    }  # fmt: skip
    assert hardware.chip("v5e").peak("bf16") == 197e12
    with pytest.raises(UserError, match=r"prune\.search\.chip: no chip 'v4'.*v5e, v5p, v6e, h100"):
        hardware.chip("v4", "prune.search.chip")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("cpu", None),
     ("NVIDIA H100 80GB HBM3", "h100"), ("", None)],
)  # fmt: skip
def test_chips_by_what_jax_calls_them(kind, name):
    chip = hardware.chip_of(kind)
    assert (chip and chip.name) == name


def test_options_are_the_chips_own():
    assert "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter" in hardware.compiler_options("TPU v5")
    assert "xla_enable_async_all_gather" in hardware.compiler_options("TPU v5 lite")
    on_h100 = hardware.compiler_options("NVIDIA H100 80GB HBM3")
    assert int(on_h100["xla_gpu_experimental_parallel_collective_overlap_limit"]) > 1
    assert hardware.compiler_options("cpu") == hardware.compiler_options("NVIDIA A100") == {}


def test_rings_over_hosts_use_the_network_of_each_of_their_members():
    gpus = [types.SimpleNamespace(process_index=place // 8) for place in range(64)]
    machine = hardware.Topology("h100:8x8", hardware.chip("h100"), gpus, (8, 8), (False, False))
    assert machine.bandwidth(gpus[:8]) == machine.bandwidth(gpus[9:11]) == 450e9  # NVLink
    assert machine.bandwidth(gpus) == machine.bandwidth(gpus[:16]) == 8 * 50e9
    assert machine.bandwidth(gpus[::8]) == 50e9
    assert machine.bandwidth(gpus[::4]) == 2 * 50e9
