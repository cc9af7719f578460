"""What is compiled for machines that are not here is what an engine runs."""

import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference import ahead
from tests.kwaicoder_jax.training import devices


def test_shapes_shardings_and_programs_are_those_of_an_engine():
    """Of a mixture on four devices: every array of weights, rows and prompts, and the traced decode step, word for word."""
    found = devices.run("inference.ahead_on_devices", 4)
    assert set(found) == {"float", "int8"}
    for each in found.values():
        assert each == {"differences": [], "same_program": True}


def test_sizes_are_rounded_as_an_engine_does():
    load = ahead.Load.of(testing.dense_config(), 5, 1100, 700, None)
    assert (load.rows, load.slots, load.prompt_slots, load.chunk) == (8, 2048, 1024, 512)


@pytest.mark.parametrize(("sizes", "where"), [((0, 10, 5), "rows"), ((1, 10, 11), "prompt_tokens")])
def test_sizes_that_cannot_be(sizes, where):
    with pytest.raises(UserError, match=f"^{where}: "):
        ahead.Load.of(testing.dense_config(), *sizes, None)
