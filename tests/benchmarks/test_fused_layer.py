"""What fused kernels save of a layer's traffic."""

import sys

import pytest

from benchmarks import fused_layer


def test_fewer_bytes_than_one_product_after_the_other():
    """Fused, a forward pass moves each gathered row once, where XLA writes it and reads it again."""
    found = fused_layer.row("v5e", (4, 512, 256), 16_384)
    rows, width, neurons, size = 16_384 * fused_layer.CHOICES, 512, 256, 2
    least = size * (rows * (3 * width + 2 * neurons) + 3 * 4 * width * neurons)  # see docs/grouped_matmul.md
    assert least <= found["forward_bytes"] < 1.4 * least
    assert found["forward_ratio"] < 0.7
    assert found["step_ratio"] < 0.95


@pytest.mark.parametrize(
    ("flag", "message"), [("--shapes=8x4096", "GROUPSxDEPTHxWIDTH"), ("--chip=v7", "no v7"), ("--tokens=x", "numbers")]
)
def test_a_wrong_flag_is_one_line(flag, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fused_layer", flag])
    with pytest.raises(SystemExit, match=message):
        fused_layer.main()
