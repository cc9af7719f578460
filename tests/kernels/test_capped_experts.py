"""Experts with a capacity: who gets a place, against a loop that reads like the papers; the MLP against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import capped_expert_mlp
from kernels.routing import capacity

SEQUENCES, TIME, CHOICES, EXPERTS, WIDTH, NEURONS = 3, 10, 2, 4, 6, 8


def places_by_the_book(expert_BTX, mask_BT, rows):
    """Sequence by sequence: all first choices in the order of time, then all second ones, ..."""
    place_BTX = np.full(expert_BTX.shape, rows)
    for row, mask_T in enumerate(mask_BT):
        taken_E = np.zeros(EXPERTS, int)
        for choice in range(expert_BTX.shape[2]):
            for time in np.flatnonzero(mask_T):
                expert = expert_BTX[row, time, choice]
                if taken_E[expert] < rows:
                    place_BTX[row, time, choice] = taken_E[expert]
                    taken_E[expert] += 1
    return place_BTX


def routings():
    rng = np.random.default_rng(0)
    shape = (SEQUENCES, TIME, CHOICES)
    return {
        "spread": np.stack([[rng.permutation(EXPERTS)[:CHOICES] for _ in range(TIME)] for _ in range(SEQUENCES)]),
        "all to two": np.broadcast_to(np.array([2, 0]), shape),
        "uneven": np.minimum(rng.integers(0, 3, shape) * np.array([1, 2]), EXPERTS - 1),
    }


def masks():
    rng = np.random.default_rng(1)
    some = rng.random((SEQUENCES, TIME)) < 0.7
    some[1] = False
    return {"all": np.ones((SEQUENCES, TIME), bool), "some": some}


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("routing", routings())
@pytest.mark.parametrize("rows", [1, 3, TIME])
def test_first_choices_come_first_and_the_earlier_token(routing, mask, rows):
    expert_BTX, mask_BT = routings()[routing].astype(np.int32), masks()[mask]
    got = capacity.places(jnp.asarray(expert_BTX), jnp.asarray(mask_BT), EXPERTS, rows)
    np.testing.assert_array_equal(got, places_by_the_book(expert_BTX, mask_BT, rows))


@pytest.mark.parametrize(
    ("factor", "tokens", "choices", "experts", "rows"),
    [(1.0, 4096, 8, 64, 512), (1.25, 4096, 8, 64, 640), (1.0, 10, 2, 8, 3), (0.01, 10, 2, 8, 1), (9.0, 10, 2, 8, 10)],
)
def test_rows_of_a_capacity(factor, tokens, choices, experts, rows):
    assert capacity.capacity(factor, tokens, choices, experts) == rows


def dense(x_MD, weight_MX, gate_EDF, up_EDF, down_EFD, expert_MX, kept_MX):
    """Every expert on every token, then a weighted selection of the pairs that are kept."""
    hidden = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, up_EDF)
    y_MED = jnp.einsum("MEF,EFD->MED", hidden, down_EFD)
    share_ME = jnp.einsum("MXE,MX->ME", jax.nn.one_hot(expert_MX, EXPERTS, dtype=x_MD.dtype), weight_MX * kept_MX)
    return jnp.einsum("ME,MED->MD", share_ME, y_MED)


@pytest.mark.parametrize("routing", routings())
@pytest.mark.parametrize("rows", [1, 3, TIME])
def test_value_and_gradients(routing, rows):
    expert_BTX, mask_BT = routings()[routing].astype(np.int32), masks()["some"]
    place_BTX = places_by_the_book(expert_BTX, mask_BT, rows)
    expert_MX, place_MX = (x.reshape(-1, CHOICES).astype(np.int32) for x in (expert_BTX, place_BTX))
    rng = np.random.default_rng(2)
    tokens, projection = SEQUENCES * TIME, (EXPERTS, WIDTH, NEURONS)
    shapes = [(tokens, WIDTH), (tokens, CHOICES), projection, projection, (EXPERTS, NEURONS, WIDTH)]
    arrays, dy = [rng.normal(size=shape) for shape in shapes], rng.normal(size=(tokens, WIDTH))
    with jax.enable_x64(True):
        y, pull = jax.vjp(lambda *arrays: dense(*arrays, expert_MX, place_MX < rows), *arrays)
        expected = [y, *pull(jnp.asarray(dy))]

    @jax.jit
    def run(arrays, dy):
        function = functools.partial(capped_expert_mlp, rows=rows, time=TIME)
        y, pull = jax.vjp(lambda x, w, *rest: function(x, w, expert_MX, place_MX, *rest), *arrays)
        return [y, *pull(dy)]

    got = run([x.astype(np.float32) for x in arrays], dy.astype(np.float32))
    for name, a, b in zip(("y", "dx", "dweight", "dgate", "dup", "ddown"), got, expected, strict=True):
        # float32 sums of some tens of products of numbers of order 1 to 10
        assert np.abs(np.asarray(a, np.float64) - np.asarray(b)).max() <= 2e-6 * max(np.abs(b).max(), 1e-3), name
