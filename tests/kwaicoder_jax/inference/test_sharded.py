"""An engine whose weights, rows and caches are spread over four devices."""

import pytest

from tests.kwaicoder_jax.training import devices


@pytest.mark.slow
def test_the_same_answers_on_every_mesh():
    same = devices.run("inference.on_devices", 4)
    assert len(same) == 5
    assert all(same.values()), same
