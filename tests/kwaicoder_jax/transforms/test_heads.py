"""Head residual merge against the paper's formula, written out head by head."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Target, heads, prune

from .test_prune import made_scores, params_and_batch


def merged_by_hand(query_DHN, scores_H, groups_K, kv_heads, to_groups, to_heads):
    """Minitron's formula with its own numbering: ranks from 1 inside each KV group, kept groups and heads in order."""
    per_group, stay, columns = len(scores_H) // kv_heads, to_heads // to_groups, []
    for group in sorted(sorted(range(kv_heads), key=lambda k: -groups_K[k])[:to_groups]):
        members = range(group * per_group, (group + 1) * per_group)
        rank = {i + 1: head for i, head in enumerate(sorted(members, key=lambda h: -scores_H[h]))}
        new = {}
        for i in range(1, stay + 1):
            new[rank[i]] = query_DHN[:, rank[i]]
            if 2 * stay - per_group + 1 <= i <= stay:
                new[rank[i]] = query_DHN[:, rank[i]] + (query_DHN[:, rank[i]] - query_DHN[:, rank[2 * stay - i + 1]])
        columns += [new[head] for head in sorted(new)]
    return np.stack(columns, axis=1)


@pytest.mark.parametrize(
    ("heads_", "kv_heads", "to_heads", "to_kv_heads"),
    [(8, 2, 6, 2), (8, 2, 4, 2), (8, 2, 3, 1), (5, 1, 3, 1), (6, 2, 4, 2), (6, 6, 4, 4), (6, 2, 3, 1), (7, 1, 4, 1)],
)
def test_merge_is_the_papers_formula(heads_, kv_heads, to_heads, to_kv_heads):
    config = testing.dense_config(layers=3, heads=heads_, kv_heads=kv_heads)
    params, _ = params_and_batch(config)
    scores = made_scores(config, heads_)
    target = Target(layers=2, heads=to_heads, kv_heads=to_kv_heads)
    student, _, record = prune.apply(params, config, scores, target, head_merge=True)
    plain, _, _ = prune.apply(params, config, scores, target)
    flat = models.flatten(params)
    for new, old in enumerate(record["kept"]["layers"]):
        expected = merged_by_hand(
            flat["layers/attention/query"][old], scores.heads_LH[old], scores.groups_LK[old], kv_heads, to_kv_heads,
            to_heads,
        )  # fmt: skip
        result = models.flatten(student)["layers/attention/query"][new]
        np.testing.assert_allclose(result, expected, rtol=1e-13)  # float64: 2a - b in one order or the other
    for name, array in models.flatten(student).items():
        if name != "layers/attention/query":
            np.testing.assert_array_equal(array, models.flatten(plain)[name])
    again, _ = prune.replay(params, config, json.loads(json.dumps(record)))
    np.testing.assert_array_equal(again["layers"]["attention"]["query"], student["layers"]["attention"]["query"])


def test_attention_scores_of_a_merged_head_are_twice_its_own_less_its_partners():
    """Through the rotary embedding, which is why merging projections means merging attention scores."""
    config = testing.dense_config(layers=2, heads=4, kv_heads=1)
    params, _ = params_and_batch(config)
    student, _, record = prune.apply(params, config, made_scores(config), Target(heads=3), head_merge=True)
    from . import reference

    rng = np.random.default_rng(0)
    x_BTD, positions_BT = rng.standard_normal((1, 5, 32)), np.arange(5)[None]
    for layer in range(2):

        def scores(p, layer=layer):
            q, k = (
                reference.rotary(np.einsum("btd,dhn->bthn", x_BTD, p["layers"]["attention"][name][layer]), positions_BT,
                                 config.rope_theta)
                for name in ("query", "key")
            )  # fmt: skip
            return np.einsum("bthn,bsn->bhts", q, k[:, :, 0])

        before, after = scores(params), scores(student)
        for new, (head, partner) in enumerate(zip(record["kept"]["heads"][layer], record["merged_heads"][layer])):
            expected = before[:, head] if partner == -1 else 2 * before[:, head] - before[:, partner]
            np.testing.assert_allclose(after[:, new], expected, rtol=1e-10, atol=1e-12)  # float64
        assert sum(partner != -1 for partner in record["merged_heads"][layer]) == 1


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_partners_are_the_dropped_heads_each_once(data):
    groups, per_group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    to_groups, stay = data.draw(st.integers(1, groups)), data.draw(st.integers(-(-per_group // 2), per_group))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scores_LH, scores_LK = rng.integers(0, 4, (2, groups * per_group)), rng.integers(0, 4, (2, groups))
    kept_LH, kept_LK = heads.keep(scores_LH, scores_LK, to_groups * stay, to_groups)
    partner_LH = heads.partners(scores_LH, kept_LK, to_groups * stay, groups)
    for layer in range(2):
        inside = np.isin(np.arange(groups * per_group) // per_group, kept_LK[layer])
        dropped = np.setdiff1d(np.flatnonzero(inside), kept_LH[layer])
        assert sorted(p for p in partner_LH[layer] if p != heads.ALONE) == dropped.tolist()
        for head, partner in zip(kept_LH[layer], partner_LH[layer]):
            assert partner == heads.ALONE or partner // per_group == head // per_group


def test_merge_keeps_kind_and_dtype_and_says_when_it_cannot_be():
    config = testing.dense_config(layers=2, heads=8, kv_heads=2)
    params, _ = params_and_batch(config)
    low = {name: jnp.asarray(x, "bfloat16") for name, x in models.flatten(params).items()}
    student, _, _ = prune.apply(models.unflatten(low), config, made_scores(config), Target(heads=6), head_merge=True)
    assert student["layers"]["attention"]["query"].dtype == jnp.bfloat16
    with pytest.raises(UserError, match=r"prune\.head_merge: 1 of the 4 heads .* keep 2 or more"):
        prune.plan(config, made_scores(config), Target(heads=2), head_merge=True)
    assert prune.plan(config, made_scores(config), Target(heads=4, kv_heads=1), head_merge=True)["merged_heads"] == []
