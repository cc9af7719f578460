"""Attention with its time split over devices; every device has the same number of tiles to multiply."""

import numpy as np
import pytest

from kwaicoder_jax.models import context_attention, context_order
from tests.kwaicoder_jax.training import devices


def test_output_and_gradients_against_float64():
    found = devices.run("models.context_on_devices", 8)
    assert len(found) == 4
    for name, errors in found.items():  # float32 sums of up to 512 numbers of order 1
        assert max(errors) < 1e-5, name


@pytest.mark.parametrize(("time", "shards", "tile"), [(24, 3, 4), (48, 3, 4), (4096, 2, 512), (48, 2, 6)])
def test_each_device_has_the_tiles_at_or_before_its_queries_and_no_more(time, shards, tile, monkeypatch):
    monkeypatch.setattr(context_attention, "TILE", min(tile, 512))
    found_tile, found = context_attention.pairs(time, shards)
    assert found_tile == tile
    count = time // tile
    assert found.shape == (shards, count * (count + 1) // 2 // shards, 2)  # the causal half, in even shares
    order = context_order.order(time, shards).reshape(shards, -1, tile)
    for device, tiles in enumerate(found):
        for own in range(count // shards):
            keys = tiles[tiles[:, 0] == own, 1]
            last = order[device, own, -1] // tile
            np.testing.assert_array_equal(keys, np.arange(last + 1))
