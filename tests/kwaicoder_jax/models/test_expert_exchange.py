"""Experts by exchange of rows, against numpy and float64, on simulated devices; the program that a TPU is given."""

import pytest

from tests.kwaicoder_jax.training import devices


@pytest.fixture(scope="module")
def found():
    return devices.run("models.exchange_on_devices", 8)


def test_what_stands_in_on_cpu_is_the_documented_primitive(found):
    assert found["emulation"] == [True] * 6


def test_every_row_comes_to_its_expert_and_back(found):
    assert found["windows"] == [True] * 3


def test_any_number_of_devices_computes_what_one_does_whatever_the_routing(found):
    assert len(found["errors"]) == 5
    for devices_and_rows, by_routing in found["errors"].items():
        assert len(by_routing) == 7
        for routing, errors in by_routing.items():
            # float32 sums of some tens of products of numbers of order 1 to 10; y, dx, dweight, dgate, dup, ddown
            assert len(errors) == 6
            assert max(errors) < 2e-6, (devices_and_rows, routing, errors)


def test_experts_with_a_capacity_do_the_same_on_any_mesh(found):
    assert len(found["capped"]) == 2 * 7
    assert max(found["capped"]) < 2e-6, found["capped"]


def test_a_tpu_is_given_the_primitive_and_its_gradient():
    found = devices.run("models.exchange_for_tpu", 1)
    # There and back; forward, and in the gradient: once more in the loop for what does not fit.
    assert found["all"] == 2 * found["often"] + 1  # the loop sends tokens again
    assert found["often"] == 4
    assert found["axes"] == ["expert"]
    rows, width = 512, 256
    assert found["payloads"] == [rows * width * 2]
