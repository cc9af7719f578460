"""On a mesh of 8 devices a transform gives the same bits, and no program gathers or makes a whole stacked parameter."""

import pytest

from tests.kwaicoder_jax.training import devices


@pytest.fixture(scope="module")
def report():
    return devices.run("transforms.transform_on_devices", 8)


def test_the_bits_are_those_of_numpy(report):
    assert len(report) == 18
    assert all(one["same"] for one in report.values())


def test_no_whole_stacked_parameter_is_gathered_or_made(report):
    """Largest array and largest collective of one device, against the largest parameter, before and after."""
    for name, one in report.items():
        assert one["array"] < max(one["before"], one["after"]) / 2, name
        assert one["collective"] < one["before"] / 2, name
