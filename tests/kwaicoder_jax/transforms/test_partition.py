"""Partitions of neurons, and cutting along them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import partition, split
from kwaicoder_jax.transforms.coactivation import CoActivation

from . import reference

METHODS = list(partition.Partition)


def statistics(layers, neurons, seed=0, tokens=60):
    """Scores and firing statistics of random neurons."""
    rng = np.random.default_rng(seed)
    fires_LMF = (rng.uniform(size=(layers, tokens, neurons)) < 0.3).astype(np.float32)
    joint_LFF = np.einsum("lmf,lmg->lfg", fires_LMF, fires_LMF)
    return {
        "neurons_LF": rng.uniform(size=(layers, neurons)),
        "coactivation": CoActivation(joint_LFF, None, None, fires_LMF.sum(1), tokens),
    }


def leading(method, replicas):
    """Replicas and layers that have an order of their own, of 3 layers."""
    return (replicas if "replica" in method else 1), (1 if "random" in method else 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.sampled_from(METHODS), st.integers(0, 99))
def test_every_neuron_is_in_one_shard(granularity, width, replicas, method, seed):
    neurons = granularity * width
    order = partition.partition(
        method, mlp_dim=neurons, granularity=granularity, replicas=replicas, seed=seed, **statistics(3, neurons, seed)
    )
    if method == "contiguous":
        assert order is None
        return
    assert order.shape == (*leading(method, replicas), neurons)
    assert (np.sort(order, axis=-1) == np.arange(neurons)).all()
    assert (np.diff(order.reshape(*order.shape[:2], granularity, width), axis=-1) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.sampled_from(METHODS), st.integers(0, 99))
def test_shared_and_routed_neurons_are_all_neurons(granularity, width, shared, method, seed):
    neurons = granularity * width + shared
    made = statistics(3, neurons, seed)
    shared_LS = partition.shared_neurons(
        shared, mlp_dim=neurons, granularity=granularity, neurons_LF=made["neurons_LF"]
    )
    worst = np.sort(made["neurons_LF"], axis=1)[:, -shared]
    assert (np.take_along_axis(made["neurons_LF"], shared_LS, axis=1) >= worst[:, None]).all()
    options = {"mlp_dim": neurons, "granularity": granularity, "replicas": 2, "seed": seed, "shared_LS": shared_LS}
    order = partition.partition(method, **options, **made)
    assert order.shape[1:] == (3, granularity * width)
    for order_LP in order:
        both = np.concatenate([order_LP, shared_LS], axis=1)
        assert (np.sort(both, axis=1) == np.arange(neurons)).all()


def test_every_replica_may_have_a_method_of_its_own():
    options = {"mlp_dim": 24, "granularity": 4, "replicas": 3, **statistics(2, 24)}
    order = partition.partition("contiguous, balanced,random", **options)
    assert order.shape == (3, 2, 24)
    assert (order[0] == np.arange(24)).all()
    np.testing.assert_array_equal(order[1], partition.partition("balanced", **options)[0])
    assert (order[2, 0] == order[2, 1]).all()
    assert (order[2] != order[1]).any()
    with pytest.raises(UserError, match=r"upcycle\.partition: 2 partitions for 3 replicas"):
        partition.partition("contiguous,random", **options)


def test_balanced_per_replica_is_balanced_and_differs():
    scores_LF = np.exp(np.random.default_rng(0).standard_normal((2, 64)))
    order = partition.partition("balanced_per_replica", mlp_dim=64, granularity=4, replicas=3, neurons_LF=scores_LF)
    contiguous = np.ptp(scores_LF.reshape(2, 4, 16).sum(-1), axis=1).min()
    for order_LF in order:
        weight_LG = np.take_along_axis(scores_LF, order_LF, axis=1).reshape(2, 4, 16).sum(-1)
        assert np.ptp(weight_LG, axis=1).max() < 0.5 * contiguous
    assert (order[0] != order[1]).any()
    assert (order[1] != order[2]).any()


def test_balanced_shards_weigh_the_same():
    scores_LF = np.exp(np.random.default_rng(0).standard_normal((2, 64)))
    order = partition.partition("balanced", mlp_dim=64, granularity=4, neurons_LF=scores_LF)[0]
    weight_LG = np.take_along_axis(scores_LF, order, axis=1).reshape(2, 4, 16).sum(-1)
    contiguous_LG = scores_LF.reshape(2, 4, 16).sum(-1)
    assert np.ptp(weight_LG, axis=1).max() < 0.2 * np.ptp(contiguous_LG, axis=1).min()
    best = np.argsort(-scores_LF[0])[:5]  # dealt to shards 0 1 2 3, then back: 3
    owner = {int(n): g for g in range(4) for n in order[0].reshape(4, 16)[g]}
    assert [owner[int(n)] for n in best] == [0, 1, 2, 3, 3]


def test_replicas_differ_and_seeds_repeat():
    first, again, other = (
        partition.partition("random_per_replica", mlp_dim=48, granularity=4, replicas=3, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


@pytest.mark.parametrize("method", METHODS)
def test_shards_sum_to_the_mlp(method):
    rng = np.random.default_rng(0)
    gate, up, down = rng.standard_normal((2, 8, 24)), rng.standard_normal((2, 8, 24)), rng.standard_normal((2, 24, 8))
    order = partition.partition(method, mlp_dim=24, granularity=4, replicas=3, **statistics(2, 24))
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
        partition.partition("contiguous", mlp_dim=48, granularity=5)
    for granularity in (0, -2, 96):
        with pytest.raises(UserError, match=r"upcycle\.granularity"):
            partition.partition("contiguous", mlp_dim=48, granularity=granularity)
    with pytest.raises(UserError, match=r"upcycle\.partition: no partition"):
        partition.partition("odd", mlp_dim=48, granularity=4)
    with pytest.raises(UserError, match="needs scores"):
        partition.partition("balanced", mlp_dim=48, granularity=4)
    with pytest.raises(UserError, match=r"upcycle\.partition: a co-activation partition needs statistics"):
        partition.partition("coactivation", mlp_dim=48, granularity=4)
    scores = np.ones((2, 48))
    with pytest.raises(UserError, match=r"upcycle\.shared_neurons: 9 of 48 .* nearby: 4, 8, 12, 16"):
        partition.shared_neurons(9, mlp_dim=48, granularity=4, neurons_LF=scores)
    for count in (-4, 48, 52):
        with pytest.raises(UserError, match=r"upcycle\.shared_neurons"):
            partition.shared_neurons(count, mlp_dim=48, granularity=4, neurons_LF=scores)
    with pytest.raises(UserError, match=r"upcycle\.shared_neurons.*pass scores"):
        partition.shared_neurons(8, mlp_dim=48, granularity=4, neurons_LF=None)
