"""Firing counts against float64 numpy, sketches against exact counts, and clusters that were planted."""

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import coactivation, router_init
from kwaicoder_jax.transforms.clustering import balanced_clusters, centroids

from . import reference

CONFIG = testing.dense_config(layers=2)


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG)


@pytest.fixture(scope="module")
def batches():
    return [testing.random_batch(CONFIG, 3, 16, seed) for seed in (0, 1)]


def fires(params, batch, count):
    """[L, M, F]: whether a neuron is among the `count` largest of its token; unpadded tokens."""
    layers = reference.forward(params, CONFIG, batch)["layers"]
    size_LMF = np.stack([np.abs(raw["neurons"][batch["segment_ids"] > 0]) for raw in layers])
    return (size_LMF >= np.sort(size_LMF, axis=-1)[:, :, -count:][:, :, :1]).astype(np.float64)


def test_counts(params, batches):
    fires_LMF = np.concatenate([fires(params, batch, 12) for batch in batches], axis=1)
    seen = coactivation.collect(params, CONFIG, batches, share=0.25)
    assert seen.tokens == fires_LMF.shape[1] == sum((b["segment_ids"] > 0).sum() for b in batches)
    np.testing.assert_array_equal(seen.fires_LF, fires_LMF.sum(1))
    np.testing.assert_array_equal(seen.joint_LFF, np.einsum("lmf,lmg->lfg", fires_LMF, fires_LMF))
    here = np.flatnonzero(fires_LMF[1].std(0) > 0)
    np.testing.assert_allclose(seen.profiles(1, here), np.corrcoef(fires_LMF[1][:, here].T), atol=1e-6)


def test_a_sketch_estimates_the_counts(params, batches):
    """The inner product of two rows is off by about sqrt(n_i n_j / S) and nothing more."""
    exact = coactivation.collect(params, CONFIG, batches, share=0.25)
    seen = coactivation.collect(params, CONFIG, batches, share=0.25, sketch=4096)
    assert seen.joint_LFF is None
    assert seen.sketch_LFS.shape == (2, 48, 4096)
    estimate = np.einsum("lfs,lgs->lfg", seen.sketch_LFS, seen.sketch_LFS) / 4096
    scale = np.sqrt(np.einsum("lf,lg->lfg", exact.fires_LF, exact.fires_LF) / 4096)
    off = (estimate - exact.joint_LFF)[scale > 0] / scale[scale > 0]
    assert np.abs(off).max() < 6
    assert 0.5 < np.sqrt(np.mean(off**2)) < 1.5
    rows = seen.profiles(0)
    correlation = exact.profiles(0)
    alive = exact.fires_LF[0] > 0
    np.testing.assert_allclose((rows @ rows.T)[alive][:, alive], correlation[alive][:, alive], atol=0.12)


@pytest.mark.parametrize("sketch", [0, 256])
@pytest.mark.parametrize(("clusters", "size"), [(2, 8), (4, 12), (8, 6)])
def test_planted_clusters_are_found(clusters, size, sketch):
    """Neurons of a group fire together on the group's tokens, and 5% of the time elsewhere."""
    rng = np.random.default_rng(clusters)
    group_F = rng.permutation(np.repeat(np.arange(clusters), size))
    group_M = rng.integers(0, clusters, 600)
    rate_MF = np.where(group_M[:, None] == group_F[None], 0.6, 0.05)
    fires_MF = (rng.uniform(size=rate_MF.shape) < rate_MF).astype(np.float32)
    signs_MS = rng.choice([-1.0, 1.0], (600, sketch or 1))
    seen = coactivation.CoActivation(
        joint_LFF=None if sketch else (fires_MF.T @ fires_MF)[None],
        sketch_LFS=(fires_MF.T @ signs_MS)[None] if sketch else None,
        signs_S=signs_MS.sum(0),
        fires_LF=fires_MF.sum(0)[None],
        tokens=600,
    )
    label_F = balanced_clusters(seen.profiles(0), clusters)
    assert (np.bincount(label_F) == size).all()
    pairs = {(int(a), int(b)) for a, b in zip(label_F, group_F)}
    assert len(pairs) == clusters
    np.testing.assert_array_equal(label_F, balanced_clusters(seen.profiles(0), clusters))


def test_clusters_are_of_equal_size_where_groups_are_not():
    rng = np.random.default_rng(0)
    points = np.repeat(np.eye(3), (20, 7, 3), axis=0) + 0.05 * rng.standard_normal((30, 3))
    label = balanced_clusters(points, 3)
    assert (np.bincount(label) == 10).all()
    whole = [set(np.flatnonzero(label == g)) for g in range(3)]
    assert sum(members <= set(range(20)) for members in whole) == 2  # the first group fills two
    assert set(range(20, 30)) in whole


def test_centroids_of_separate_clouds():
    rng = np.random.default_rng(1)
    centres = rng.standard_normal((5, 8)) * 4
    points = np.repeat(centres, 40, axis=0) + 0.1 * rng.standard_normal((200, 8))
    found = centroids(points, 5)
    distance = np.linalg.norm(found[:, None] - centres[None], axis=-1)
    assert sorted(distance.argmin(1)) == [0, 1, 2, 3, 4]
    assert distance.min(1).max() < 0.1


def test_inputs_of_the_mlps(params, batches):
    inputs = router_init.mlp_inputs(params, CONFIG, batches, tokens_per_batch=1000)
    for layer in range(2):
        expected = [
            reference.forward(params, CONFIG, batch)["layers"][layer]["mlp_norm_out"][batch["segment_ids"] > 0]
            for batch in batches
        ]
        assert reference.relative(inputs[layer], np.concatenate(expected)) < 1e-5
    assert router_init.mlp_inputs(params, CONFIG, batches, tokens_per_batch=7).shape == (2, 14, 32)


def test_errors(params, batches):
    with pytest.raises(UserError, match="no tokens"):
        coactivation.collect(params, CONFIG, [])
    with pytest.raises(UserError, match="no tokens"):
        router_init.mlp_inputs(params, CONFIG, [])
    with pytest.raises(UserError, match="'positions'"):
        coactivation.collect(params, CONFIG, [{"inputs": batches[0]["inputs"]}])
    with pytest.raises(UserError, match="dense models"):
        coactivation.collect(params, testing.moe_config(), batches)
    for options in ({"share": 0.0}, {"share": 1.0}, {"sketch": -1}):
        with pytest.raises(UserError, match="share"):
            coactivation.collect(params, CONFIG, batches, **options)
