"""The mesh and its rules; a step on any mesh is the step on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training import MeshConfig
from tests.kwaicoder_jax.training import devices, mesh_variants


@pytest.fixture(scope="module")
def found():
    return devices.run("training.mesh_variants", 8)


def test_a_step_on_any_mesh_is_the_step_on_one_device(found):
    assert len(found["errors"]) == 10
    for mesh, (metrics, gradients) in found["errors"].items():  # float32 sums in another order
        assert metrics < 1e-5, mesh
        assert gradients < 1e-5, mesh


def test_every_parameter_is_split_along_the_axes_that_its_declaration_names(found):
    halved = {"embed", "vocab", "heads", "kv_heads", "mlp", "experts", "expert_mlp"}
    for kind, config in (("dense", mesh_variants.DENSE), ("moe", mesh_variants.MOE)):
        for name, declaration in models.declarations(config).items():
            expected = [n // 2 if axis in halved else n for n, axis in zip(declaration.shape, declaration.axes)]
            assert found["shards"][kind][name] == expected, name
    assert found["shards"]["moe"]["layers/moe/gate"] == [1, 3, 16, 12]  # written out: layer, experts, embed, neurons
    assert found["shards"]["dense"]["layers/mlp/down"] == [1, 22, 16]


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(MeshConfig(), [8, 1, 1, 1, 1]), (MeshConfig(fsdp=2, expert=2), [2, 2, 2, 1, 1]), (MeshConfig(2, 4), [2, 4, 1, 1, 1]),
     (MeshConfig(data=2, fsdp=-1), [2, 4, 1, 1, 1]), (MeshConfig(data=8, expert=-1), [8, 1, 1, 1, 1])],
)  # fmt: skip
def test_one_axis_takes_what_the_others_leave(config, sizes):
    mesh = training.make_mesh(config, jax.devices() * 8)
    assert mesh.axis_names == ("data", "fsdp", "expert", "tensor", "context")
    assert list(mesh.shape.values()) == sizes


@pytest.mark.parametrize(
    "config",
    [MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(tensor=16), MeshConfig(fsdp=0), MeshConfig(data=0),
     MeshConfig(fsdp=-1), MeshConfig(fsdp=-2), MeshConfig(data=-8), MeshConfig(data=3, expert=-1)],
)  # fmt: skip
def test_sizes_that_do_not_multiply_to_the_devices_are_user_errors(config):
    with pytest.raises(UserError, match=r"mesh: .*does not multiply to the 8 devices here; .*the one that is -1 takes"):
        training.make_mesh(config, jax.devices() * 8)


@pytest.mark.slow
def test_time_split_over_devices_is_time_on_one():
    """Packed rows; balance within rows; every token to two experts, the others empty; distillation; a teacher's cache."""
    errors = devices.run("training.context_on_devices", 8)
    assert len(errors) > 70
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)  # float32 sums in another order


@pytest.mark.parametrize(("time", "context", "multiple"), [(12, 4, 8), (15, 2, 4), (2, 2, 4)])
def test_a_time_that_devices_cannot_share_is_a_user_error(time, context, multiple):
    mesh = training.make_mesh(MeshConfig(data=1, context=context), jax.devices() * context)
    found = rf"mesh.context: sequences of {time} tokens, which {context} devices .*a multiple of {multiple}$"
    with pytest.raises(UserError, match=found):
        training.shard_batch({"inputs": np.zeros((4, time), np.int32)}, mesh)


def test_processes_place_the_part_of_time_that_their_devices_hold():
    """(data, context) = (1, 4): both have all rows and half of the time; (2, 2) and (4, 1): half of the rows."""
    found = devices.run_together("training.placed_by_processes", 2, devices_each=2)
    assert found == [
        [[True, True], [[4, 2]], [0, 1]], [[True, True], [[2, 4]], [0, 2]], [[True, True], [[1, 8]], [0, 2]],
    ]  # fmt: skip


def test_on_tpu_each_chunk_is_whole_blocks_of_the_kernels():
    assert models.context_multiple(4, "tpu") == 1024
    assert models.context_multiple(4, "cpu") == 8
    assert models.context_multiple(1, "tpu") == 1


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [(MeshConfig(), 4, [4, 1, 1, 1, 1]), (MeshConfig(fsdp=8), 4, [1, 4, 1, 1, 1]), (MeshConfig(fsdp=3), 1, [1] * 5),
     (MeshConfig(8, 2), 4, [2, 2, 1, 1, 1]), (MeshConfig(fsdp=6, expert=2), 4, [1, 2, 2, 1, 1]),
     (MeshConfig(4, 2, tensor=2), 4, [1, 2, 1, 2, 1]),
     (MeshConfig(data=2, fsdp=-1, tensor=2), 4, [2, 1, 1, 2, 1])],
)  # fmt: skip
def test_one_process_s_share_of_a_mesh_is_a_mesh_of_its_devices(config, devices, sizes):
    mesh = training.make_mesh(training.share_of(config, devices), jax.devices() * devices)
    assert list(mesh.shape.values()) == sizes


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(data=1, fsdp=2, context=4), [1, 8, 1, 1, 1]),
        (MeshConfig(data=1, fsdp=-1, context=4), [1, 8, 1, 1, 1]),
        (MeshConfig(data=1, fsdp=2, context=-1), [1, 8, 1, 1, 1]),
        (MeshConfig(data=1, fsdp=2, tensor=2, context=2), [1, 4, 1, 2, 1]),
    ],
)
def test_rows_in_the_place_of_parts_of_rows(config, sizes):
    mesh = training.make_mesh(training.without_context(config), jax.devices() * 8)
    assert list(mesh.shape.values()) == sizes


def test_two_axes_on_one_mesh_axis_are_refused():
    mesh = training.make_mesh(MeshConfig(), jax.devices()[:1])
    declaration = models.Declaration((4, 6), jnp.dtype("float32"), ("heads", "mlp"))
    with pytest.raises(UserError, match=r"mesh rules: two axes of odd .*'heads', 'mlp'.*tensor"):
        training.partition(declaration, mesh, "odd")


def test_an_axis_that_devices_cannot_share_is_a_user_error():
    mesh = training.make_mesh(MeshConfig(tensor=2, data=1), jax.devices() * 2)
    with pytest.raises(UserError, match=r"mesh.tensor: embedding has 97 vocab, which 2 devices cannot share; choose"):
        training.param_shardings(testing.dense_config(), mesh)


def test_rows_that_devices_cannot_share_are_a_user_error():
    mesh = training.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices() * 4)
    with pytest.raises(UserError, match=r"mesh: a batch of 6 rows, which 4 devices .*a multiple of 4"):
        training.shard_batch({"inputs": np.zeros((6, 8), np.int32)}, mesh)


def test_a_batch_lies_over_all_data_like_axes():
    mesh = training.make_mesh(MeshConfig(2, 2, 2), jax.devices() * 8)
    assert training.batch_sharding(mesh).shard_shape((16, 5)) == (2, 5)
    with_context = training.make_mesh(MeshConfig(data=2, context=4), jax.devices() * 8)
    assert training.batch_sharding(with_context).shard_shape((16, 8)) == (8, 2)
    assert training.row_sharding(with_context).shard_shape((16, 8)) == (8, 8)
    assert training.replicated(mesh).shard_shape((16, 5)) == (16, 5)


@pytest.mark.slow
def test_families_on_every_axis_at_once():
    """Latent attention, a dense first layer, groups of experts; biases everywhere, also on experts; a window."""
    errors = devices.run("training.families_on_devices", 8)
    assert len(errors) > 60
    assert max(errors.values()) < 1e-5, max(errors, key=errors.get)  # float32 sums in another order
