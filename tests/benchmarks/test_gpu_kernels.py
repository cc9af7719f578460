"""The table of kernels for H100: what is counted from sizes of groups, by hand, and what the compiler says, if it is here."""

import numpy as np
import pytest

from benchmarks import gpu_kernels
from benchmarks import gpu_tiles_walked as walked
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import gpu_code, topology


def test_flops_and_bytes_of_two_groups():
    """300 and 212 rows: 3 and 2 tiles from their first rows on (rounded down to 8), 3 and 3 at multiples of 128."""
    sizes, depth, width = np.array([300, 212]), 128, 128
    ours, upstream = walked.product(sizes, depth, width), walked.upstream_product(sizes, depth, width)
    assert ours.flops == 5 * 128 * 2 * depth * width
    assert upstream.flops == 5 * 128 * 2 * depth * width  # of 4 + 2 - 1 visits all are some group's
    assert ours.copied_bytes == 5 * 2 * (128 + 128) * depth
    # Rows of a tile that another group reads again come from the cache; what is written is written once.
    assert upstream.hbm_bytes == 2 * (512 * depth + 2 * depth * width + 512 * width)
    assert upstream.hbm_bytes < ours.hbm_bytes <= upstream.hbm_bytes + 2 * 128 * depth
    outer = walked.outer(sizes, depth, width)
    steps = 5 + 4  # rows [0, 320) and [256, 512), 64 at a time
    assert outer.flops == steps * 64 * 2 * depth * width
    assert outer.hbm_bytes == steps * 64 * 2 * (depth + width) + 2 * 2 * depth * width


def test_visits_of_no_group_are_work_for_upstream():
    sizes = np.array([256, 0, 0, 0])
    assert walked.product(sizes, 64, 64).flops == 256 * 2 * 64 * 64
    assert walked.upstream_product(sizes, 64, 128).flops == (2 + 3) * 128 * 2 * 64 * 128


def test_a_cache_that_is_too_small():
    cache = walked._Cache(100)
    assert [cache.read(name, 40) for name in "ababcab"] == [40, 40, 0, 0, 40, 40, 40]


def test_what_was_computed_for_random_groups():
    """64 experts of 512 rows: at most half a tile a group and side in vain, and nearly no byte twice."""
    sizes = gpu_kernels.multinomial(32_768, 64)
    assert sizes.sum() == 32_768
    least = 2 * (32_768 * (2048 + 1408) + 64 * 2048 * 1408)
    for product in gpu_kernels.PRODUCTS:
        ours = gpu_kernels.executed("ours", product, sizes, 2048, 1408)
        upstream = gpu_kernels.executed("upstream", product, sizes, 2048, 1408)
        assert ours.flops < 1.14 * 2 * 32_768 * 2048 * 1408
        assert ours.flops <= upstream.flops
        assert least <= ours.hbm_bytes < 1.06 * least


@pytest.mark.slow
@pytest.mark.parametrize("product", gpu_kernels.PRODUCTS)
@pytest.mark.parametrize("shape", gpu_kernels.SHAPES)
def test_compiled_for_an_h100(shape, product):
    try:
        machine = topology("h100:1")
    except UserError as error:
        pytest.skip(str(error))
    row = gpu_kernels.measure(machine, "ours", product, shape, 32_768)
    assert row["spilled_bytes"] == 0
    assert row["registers"] <= 65_536 // row["threads"]
    assert 1024 * row["shared_kb"] <= gpu_code.SHARED_LIMIT
    assert (1 if product == "drhs" else 0) in row["waits"]  # for the products that read what the next copy overwrites
