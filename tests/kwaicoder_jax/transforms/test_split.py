"""Partitions of neurons, and cutting along them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import split

from . import reference


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.sampled_from(split.Partition), st.integers(0, 99))
def test_every_neuron_is_in_one_shard(granularity, width, replicas, method, seed):
    neurons = granularity * width
    scores_LF = np.random.default_rng(seed).uniform(size=(3, neurons))
    order = split.partition(
        method, mlp_dim=neurons, granularity=granularity, replicas=replicas, seed=seed, neurons_LF=scores_LF
    )
    if method is split.Partition.CONTIGUOUS:
        assert order is None
        return
    leading = (1, 3) if method is split.Partition.BALANCED else (replicas, 1)
    assert order.shape == (*leading, neurons)
    assert (np.sort(order, axis=-1) == np.arange(neurons)).all()
    runs = order.reshape(*leading, granularity, width)
    assert (np.diff(runs, axis=-1) > 0).all()


def test_balanced_shards_weigh_the_same():
    scores_LF = np.exp(np.random.default_rng(0).standard_normal((2, 64)))
    order = split.partition("balanced", mlp_dim=64, granularity=4, neurons_LF=scores_LF)[0]
    weight_LG = np.take_along_axis(scores_LF, order, axis=1).reshape(2, 4, 16).sum(-1)
    contiguous_LG = scores_LF.reshape(2, 4, 16).sum(-1)
    assert np.ptp(weight_LG, axis=1).max() < 0.2 * np.ptp(contiguous_LG, axis=1).min()
    best = np.argsort(-scores_LF[0])[:5]  # dealt to shards 0 1 2 3, then back: 3
    owner = {int(n): g for g in range(4) for n in order[0].reshape(4, 16)[g]}
    assert [owner[int(n)] for n in best] == [0, 1, 2, 3, 3]


def test_replicas_differ_and_seeds_repeat():
    first, again, other = (
        split.partition("random_per_replica", mlp_dim=48, granularity=4, replicas=3, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("method", list(split.Partition))
def test_shards_sum_to_the_mlp(method):
    rng = np.random.default_rng(0)
    gate, up, down = rng.standard_normal((2, 8, 24)), rng.standard_normal((2, 8, 24)), rng.standard_normal((2, 24, 8))
    order = split.partition(method, mlp_dim=24, granularity=4, replicas=3, neurons_LF=rng.uniform(size=(2, 24)))
    pieces = {}
    for name, array in (("gate", gate), ("up", up), ("down", down)):
        axes = ("layers", "mlp", "embed") if name == "down" else ("layers", "embed", "mlp")
        pieces[name], names = split.shards(array, axes, 4, order)
        assert names == ("layers", "replica", "shard", *(a.replace("mlp", "expert_mlp") for a in axes[1:]))
    x = rng.standard_normal((5, 8))
    for layer in range(2):
        whole, _ = reference.dense_mlp(x, {"gate": gate[layer], "up": up[layer], "down": down[layer]})
        for r in range(pieces["up"].shape[1]):
            parts = [reference.dense_mlp(x, {n: p[layer, r, g] for n, p in pieces.items()})[0] for g in range(4)]
            assert reference.relative(sum(parts), whole) < 1e-13


def test_errors():
    with pytest.raises(UserError, match=r"upcycle\.granularity: 5 does not divide the 48 .* nearby: 3, 4, 6, 8"):
        split.partition("contiguous", mlp_dim=48, granularity=5)
    for granularity in (0, -2, 96):
        with pytest.raises(UserError, match=r"upcycle\.granularity"):
            split.partition("contiguous", mlp_dim=48, granularity=granularity)
    with pytest.raises(UserError, match=r"upcycle\.partition: no partition"):
        split.partition("odd", mlp_dim=48, granularity=4)
    with pytest.raises(UserError, match="needs scores"):
        split.partition("balanced", mlp_dim=48, granularity=4)
