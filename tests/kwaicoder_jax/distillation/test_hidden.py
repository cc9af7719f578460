"""Layer maps, projections and the distance of hidden states, against float64 numpy."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import distillation
from kwaicoder_jax.errors import UserError

P, B, T, D, C = 3, 2, 7, 5, 9
KINDS = ("mse", "cosine")


def arrays(seed=0):
    """Student states, projections, teacher states, and a mask of 0, 1 and 0.5."""
    rng = np.random.default_rng(seed)
    student, matrix, teacher = (rng.standard_normal(s) for s in ((P, B, T, D), (P, D, C), (P, B, T, C)))
    mask = rng.choice([0.0, 1.0, 0.5], (B, T))
    return [x.astype(np.float32) for x in (student, matrix, teacher * [[[[1.0]]], [[[10.0]]], [[[100.0]]]], mask)]


def reference(student, matrix, teacher, mask, kind):
    student, matrix, teacher, mask = (np.asarray(x, np.float64) for x in (student, matrix, teacher, mask))
    per_layer = []
    for layer in range(len(student)):
        projected = student[layer] @ matrix[layer]
        if kind == "mse":
            error = ((projected - teacher[layer]) ** 2).sum(-1)
            per_layer.append((mask * error).sum() / (mask * (teacher[layer] ** 2).sum(-1)).sum())
        else:
            norms = np.linalg.norm(projected, axis=-1) * np.linalg.norm(teacher[layer], axis=-1)
            per_layer.append((mask * (1 - (projected * teacher[layer]).sum(-1) / norms)).sum() / mask.sum())
    return np.mean(per_layer)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_loss_is_the_mean_over_layers(kind):
    np.testing.assert_allclose(distillation.hidden_loss(*arrays(), kind), reference(*arrays(), kind), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind):
    values = arrays()
    gradients = jax.grad(distillation.hidden_loss, (0, 1, 2))(*values, kind)
    rng = np.random.default_rng(1)
    for argument in (0, 1):
        direction = rng.standard_normal(values[argument].shape)
        at = [x.astype(np.float64) for x in values]
        sides = []
        for step in (1e-6, -1e-6):
            moved = list(at)
            moved[argument] = at[argument] + step * direction
            sides.append(reference(*moved, kind))
        slope = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose((gradients[argument] * direction).sum(), slope, rtol=1e-4, atol=1e-6)
    assert (np.asarray(gradients[2]) == 0).all(), "the teacher is not trained"


@pytest.mark.parametrize("kind", KINDS)
def test_zero_where_the_projected_student_is_the_teacher(kind):
    student, matrix, _, mask = arrays()
    teacher = np.einsum("PBTD,PDC->PBTC", student, matrix)
    value, gradient = jax.value_and_grad(distillation.hidden_loss)(student, matrix, teacher, mask, kind)
    np.testing.assert_allclose(value, 0, atol=1e-6)  # 1 - cosine is rounded at 1
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_contribute_nothing(kind):
    student, matrix, teacher, mask = arrays()
    hidden = (mask == 0)[None, :, :, None]
    other = (np.where(hidden, 50 - student, student), matrix, np.where(hidden, 1e3, teacher), mask)
    function = jax.value_and_grad(distillation.hidden_loss, (0, 1))
    (value, gradients), (other_value, other_gradients) = function(*arrays(), kind), function(*other, kind)
    assert value == other_value
    for a, b in zip(gradients, other_gradients):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_states_and_an_empty_mask_give_finite_gradients(kind):
    student, matrix, teacher, mask = arrays()
    student[:, 0, 0] = teacher[:, 1, 1] = 0  # as padding or a token that was never trained may be
    function = jax.value_and_grad(distillation.hidden_loss, (0, 1))
    for weights in (mask, np.ones_like(mask), np.zeros_like(mask)):
        value, gradients = function(student, matrix, teacher, weights, kind)
        assert np.isfinite(value)
        assert all(np.isfinite(g).all() for g in gradients)


def test_mse_does_not_depend_on_a_layer_s_scale():
    student, matrix, teacher, mask = arrays()
    scale = np.asarray([1, 1e3, 1e-3], np.float32)[:, None, None, None]
    scaled = distillation.hidden_loss(student * scale, matrix, teacher * scale, mask)
    np.testing.assert_allclose(scaled, distillation.hidden_loss(student, matrix, teacher, mask), rtol=1e-5)


def test_unknown_loss_is_a_user_error():
    with pytest.raises(UserError, match=r"loss.hidden_loss: no loss 'l1'; mse or cosine"):
        distillation.hidden_loss(*arrays(), "l1")


def test_layer_map_holds_original_indices_and_always_the_last_layer():
    kept = [0, 1, 4, 5, 8, 11, 13]
    assert distillation.layer_map(kept) == list(enumerate(kept))
    assert distillation.layer_map(kept, every=2) == [(0, 0), (2, 4), (4, 8), (6, 13)]
    assert distillation.layer_map(kept, every=3) == [(0, 0), (3, 5), (6, 13)]
    assert distillation.layer_map(kept, every=4) == [(2, 4), (6, 13)]
    assert distillation.layer_map(kept, every=100) == [(6, 13)]


def test_selection_matrix_places_channels_where_the_teacher_has_them():
    kept, teacher = [1, 4, 5, 8], np.random.default_rng(2).standard_normal((6, 10)).astype(np.float32)
    matrix = distillation.selection_matrix(kept, 10)
    assert (matrix.shape, matrix.dtype) == ((4, 10), np.float32)
    np.testing.assert_array_equal(matrix @ matrix.T, np.eye(4))
    expected = np.where(np.isin(np.arange(10), kept), teacher, 0)
    np.testing.assert_array_equal(teacher[:, kept] @ matrix, expected)


@pytest.mark.parametrize(("kept", "wrong"), [([0, 10], 10), ([-1, 3], -1)])
def test_a_channel_that_the_teacher_lacks_is_named(kept, wrong):
    with pytest.raises(UserError, match=f"channel {wrong} of a teacher with 10"):
        distillation.selection_matrix(kept, 10)


def test_initial_projections_are_one_matrix_per_pair_and_one_for_the_embedding():
    projections = distillation.initial_projections([(0, 0), (1, 3)], [2, 3, 6], 7)
    assert projections["layers"].shape == (2, 3, 7)
    for matrix in (projections["embedding"], *projections["layers"]):
        np.testing.assert_array_equal(matrix, distillation.selection_matrix([2, 3, 6], 7))
