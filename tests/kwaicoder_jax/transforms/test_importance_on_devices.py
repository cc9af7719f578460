"""Scores do not depend on how parameters and batches lie on a mesh."""

import pytest

from tests.kwaicoder_jax.training import devices


@pytest.fixture(scope="module")
def found():
    return devices.run("transforms.importance_on_devices", 8)


def test_scores_on_any_mesh_are_those_of_one_device(found):
    assert len(found) == 4
    for mesh, errors in found.items():
        assert {"experts_LE", "expert_neurons_LEF", "shared_neurons_LS"} <= set(errors) or mesh.startswith("dense")
        for field, error in errors.items():
            assert error < 1e-5, (mesh, field)  # float32 sums in another order
