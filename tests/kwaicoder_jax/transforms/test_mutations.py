"""Faults put into the transforms, one at a time: each has to turn a test of this folder red."""

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.transforms import depth, merge, prune, upcycle

from . import reference, test_prune, test_upcycle
from .upcycling import CONFIG

PARAMS = reference.float64(testing.random_params(CONFIG))
TOKENS = np.random.default_rng(1).standard_normal((2, 6, CONFIG.model_dim))


def exactness():
    test_upcycle.test_the_function_is_the_same(PARAMS, TOKENS, 4, 2, 1)


def layout():
    test_upcycle.test_layout_of_experts_and_router(PARAMS)


def norm_correction():
    test_prune.test_norm_correction_is_the_root_of_the_kept_energy_share()


def silent_layers():
    test_prune.test_silent_layers_leave_no_trace()


def one_expert_by_098(monkeypatch):
    whole = merge.experts

    def faulty(*arguments, **options):
        array = whole(*arguments, **options).copy()
        array[:, 1] *= 0.98
        return array

    monkeypatch.setattr(merge, "experts", faulty)


def two_shards_swapped(monkeypatch):
    """Of the up projection alone: of all three matrices it would be another partition."""
    whole = upcycle.parameter

    def faulty(record, name, arrays, layer=None):
        array = whole(record, name, arrays, layer)
        if name.endswith("moe/up"):
            array = array.copy()
            array[:, [0, 1]] = array[:, [1, 0]]
        return array

    monkeypatch.setattr(upcycle, "parameter", faulty)


def shard_major_order(monkeypatch):
    whole = merge.experts

    def faulty(array, axes, target_axes, *, granularity, replicas, **options):
        array = whole(array, axes, target_axes, granularity=granularity, replicas=replicas, **options)
        order = np.arange(replicas * granularity).reshape(replicas, granularity).T.reshape(-1)
        return array[:, order]

    monkeypatch.setattr(merge, "experts", faulty)


def factor_on_the_gate(monkeypatch):
    monkeypatch.setattr(merge, "placed", lambda placement, factor: {"gate": factor, "up": 1.0, "down": 1.0})


def no_norm_correction(monkeypatch):
    monkeypatch.setattr(prune, "_norm_factors", lambda *arguments: {})


def layer_map_off_by_one(monkeypatch):
    whole = depth.keep
    monkeypatch.setattr(depth, "keep", lambda *arguments: np.roll(whole(*arguments), 1))


def layer_map_one_further(monkeypatch):
    whole = depth.keep

    def faulty(scores, count, *arguments):
        kept = whole(scores, count, *arguments)
        return np.where((kept > 0) & (kept + 1 < len(scores.layers_L)), kept + 1, kept)

    monkeypatch.setattr(depth, "keep", faulty)


MUTATIONS = {
    one_expert_by_098: exactness,
    two_shards_swapped: exactness,
    shard_major_order: layout,
    factor_on_the_gate: exactness,
    no_norm_correction: norm_correction,
    layer_map_off_by_one: silent_layers,
    layer_map_one_further: silent_layers,
}


@pytest.mark.parametrize("check", sorted(set(MUTATIONS.values()), key=lambda check: check.__name__))
def test_without_a_fault_it_passes(check):
    check()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_fault_is_seen(monkeypatch, mutation):
    mutation(monkeypatch)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        MUTATIONS[mutation]()
