"""On a mesh of 8 devices a transform gives the same bits, and no program gathers or makes a whole stacked parameter."""

import pytest

from kwaicoder_jax import training
from kwaicoder_jax.transforms import arrays
from tests.kwaicoder_jax.training import devices


@pytest.fixture(scope="module")
def report():
    return devices.run("transforms.transform_on_devices", 8)


def test_axes_are_at_home_where_training_spreads_them():
    assert dict(training.mesh.RULES) | {"replica": "expert"} == arrays.HOMES


def test_the_bits_are_those_of_numpy(report):
    assert len(report["whole"]) == 15
    assert all(report["whole"].values())
    assert len(report["each"]) > 150
    assert all(one["same"] for one in report["each"].values())


def test_no_whole_stacked_parameter_is_gathered_or_made(report):
    """Of each parameter by itself: neither as large as source or result, the smaller of them.

    And of matrices, never more than what a device holds of source or result anyway; a norm's few numbers are not
    always shared evenly, and where every axis is cut to a half a part of the source is more than the whole result.
    """
    for name, one in report["each"].items():
        largest = max(one["collective"], one["array"])
        assert largest < one["smallest"] or largest <= one["part"], name
        assert largest <= one["part"] or name.endswith("norm/scale"), name
