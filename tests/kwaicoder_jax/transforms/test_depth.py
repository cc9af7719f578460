"""Which layers stay, and sizes that no scan over identical layers has."""

import itertools

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Target, prune

from .test_prune import made_scores

CONFIG = testing.dense_config(layers=6)


def kept(target, scores, **options):
    return prune.plan(CONFIG, scores, Target(layers=target), **options)["kept"]["layers"]


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("target", [2, 3, 4, 5, 6])
def test_block_is_the_least_influential_one_of_its_length(target, ends):
    rng = np.random.default_rng(target)
    blocks_LL = rng.uniform(0, 1, (6, 6))
    blocks_LL[np.tril_indices(6, -1)] = np.nan  # means nothing
    best, least = list(range(6)), np.inf
    for start, end in itertools.combinations(range(7), 2):
        if end - start == 6 - target and not (ends and (start == 0 or end == 6)) and blocks_LL[start, end - 1] < least:
            least, best = blocks_LL[start, end - 1], [*range(start), *range(end, 6)]
    scores = made_scores(CONFIG, blocks_LL=blocks_LL)
    assert kept(target, scores, layer_scores="block", protect_ends=ends) == best


def test_leaving_one_out_keeps_what_the_loss_needs():
    scores = made_scores(CONFIG, layers_L=np.arange(6.0), leave_one_out_L=np.array([0.0, -0.1, 0.4, 0.2, 0.3, 0.1]))
    assert kept(4, scores, layer_scores="leave_one_out") == [0, 2, 4, 5]
    assert kept(3, scores, layer_scores="leave_one_out", protect_ends=False) == [2, 3, 4]
    assert kept(3, scores) == [0, 4, 5]


def test_scores_that_were_not_measured_and_names_that_are_not_known():
    for choice in ("block", "leave_one_out"):
        with pytest.raises(UserError, match=r"prune\.layer_scores: the scores do not hold"):
            kept(4, made_scores(CONFIG), layer_scores=choice)
    with pytest.raises(UserError, match=r"prune\.layer_scores: no scores 'deepest'.*influence, block, leave_one_out"):
        kept(4, made_scores(CONFIG), layer_scores="deepest")
    with pytest.raises(UserError, match=r"prune\.target\.layers.*protect_ends"):
        kept(1, made_scores(CONFIG, blocks_LL=np.ones((6, 6))), layer_scores="block")


def test_a_size_for_each_layer_is_refused_with_its_reason():
    for value in ([48, 48, 32], (48,)):
        with pytest.raises(UserError, match=r"prune\.target\.mlp_dim: .*scan over identical layers.*one number"):
            Target(mlp_dim=value)
    with pytest.raises(UserError, match=r"prune\.target\.heads: 2\.0 is not a whole number"):
        Target(heads=2.0)
