"""Routing against numpy: which experts, with what weights, and what the statistics say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models import ExpertsConfig, Router
from kwaicoder_jax.models.moe import MoE, router_statistics, selection

LOGITS = np.random.default_rng(0).standard_normal((40, 7)).astype(np.float32) * 2


def experts(router, k=3, **changes):
    return ExpertsConfig(7, k, 24, router, **changes)


def softmax(x):
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("router", Router)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_weights_and_probabilities(router, k):
    weight, index, probability = models.choose_experts(jnp.asarray(LOGITS), experts(router, k, routed_scale=2.5))
    expected_index = np.argsort(-LOGITS, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(index, expected_index)
    chosen = np.take_along_axis(LOGITS, expected_index, -1)
    sigmoid = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    if router is Router.SIGMOID:
        picked = np.take_along_axis(sigmoid, expected_index, -1)
        expected, expected_probability = (
            picked / picked.sum(-1, keepdims=True),
            sigmoid / sigmoid.sum(-1, keepdims=True),
        )
    else:
        expected_probability = softmax(LOGITS)
        full = np.take_along_axis(expected_probability, expected_index, -1)
        expected = full if router is Router.SOFTMAX_TOPK else softmax(chosen)
    np.testing.assert_allclose(weight, 2.5 * expected, rtol=1e-5)
    np.testing.assert_allclose(probability, expected_probability, rtol=1e-5)
    assert weight.dtype == probability.dtype == jnp.float32


def test_a_selection_bias_moves_the_choice_and_not_the_weights():
    mixture = experts(Router.SIGMOID, routed_scale=2.5, router_bias=True)
    bias = np.array([0, 0.7, 0, 0, -0.9, 0, 0], np.float32)
    ranked_by = selection(jnp.asarray(LOGITS), jnp.asarray(bias), mixture)
    weight, index, _ = models.choose_experts(jnp.asarray(LOGITS), mixture, ranked_by)
    sigmoid = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected_index = np.argsort(-(sigmoid + bias), axis=-1, kind="stable")[:, :3]
    np.testing.assert_array_equal(index, expected_index)
    assert (expected_index != np.argsort(-LOGITS, axis=-1, kind="stable")[:, :3]).any()
    picked = np.take_along_axis(sigmoid, expected_index, -1)
    np.testing.assert_allclose(weight, 2.5 * picked / picked.sum(-1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize(("score", "best"), [("max", 1), ("top2", 2)])
@pytest.mark.parametrize("router", [Router.SIGMOID, Router.SOFTMAX_TOPK])
def test_experts_come_from_the_best_groups(score, best, router):
    biased = router is Router.SIGMOID
    mixture = ExpertsConfig(12, 3, 24, router, 2.5, router_bias=biased, groups=4, top_groups=2, group_score=score)
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((60, 12)).astype(np.float32) * 2
    bias = rng.standard_normal(12).astype(np.float32) * 0.3 if biased else None
    ranked_by = selection(jnp.asarray(logits), None if bias is None else jnp.asarray(bias), mixture)
    weight, index, _ = models.choose_experts(jnp.asarray(logits), mixture, ranked_by)
    scores = 1 / (1 + np.exp(-logits.astype(np.float64))) if biased else softmax(logits)
    fewer_groups = 0
    for row, (score_E, chosen_X) in enumerate(zip(scores, np.asarray(index))):
        ranked_E = score_E + bias if biased else score_E
        groups = sorted(range(4), key=lambda g: -np.sort(ranked_E[3 * g : 3 * g + 3])[-best:].sum())[:2]
        allowed = sorted(e for g in groups for e in range(3 * g, 3 * g + 3))
        expected = sorted(allowed, key=lambda e: -ranked_E[e])[:3]
        assert chosen_X.tolist() == expected
        fewer_groups += set(expected) != set(np.argsort(-ranked_E)[:3].tolist())
        total = score_E[expected].sum() if biased else 1.0
        np.testing.assert_allclose(weight[row], 2.5 * score_E[expected] / total, rtol=1e-5)
    assert fewer_groups > 5, "the groups have to matter"


def test_all_groups_are_no_limit():
    mixture = ExpertsConfig(12, 3, 24, Router.SOFTMAX_TOPK, groups=4, top_groups=4)
    assert selection(jnp.zeros((2, 12)), None, mixture) is None


def test_biases_of_experts_reach_output_and_statistics():
    """One layer against numpy, expert by expert: outputs, and importance of experts and neurons."""
    config = testing.family_configs()["mixtral_with_biases"]
    p = {n.removeprefix("layers/moe/"): np.asarray(x)[0] for n, x in models.flatten(testing.random_params(config)).items()
         if n.startswith("layers/moe/")}  # fmt: skip
    x = np.random.default_rng(5).standard_normal((2, 9, config.model_dim)).astype(np.float32)
    mask = np.ones((2, 9), bool)
    mask[1, 6:] = False
    apply = jax.jit(functools.partial(MoE(config, models.Runtime()).apply, mutable=["statistics"]))
    (y, _), recorded = apply({"params": p}, x, mask)
    logits = x.astype(np.float64) @ p["router"]
    expected, importance, mean = np.zeros(x.shape), np.zeros(7), np.zeros((7, 14))
    for row in range(2):
        sums, count = np.zeros((7, 14)), np.zeros((7, 1))
        for time in range(9):
            chosen = np.argsort(-logits[row, time])[:2]
            weights = softmax(logits[row, time, chosen])
            for e, weight in zip(chosen, weights):
                gate = x[row, time] @ p["gate"][e] + p["gate_bias"][e]
                neurons = gate / (1 + np.exp(-gate)) * (x[row, time] @ p["up"][e] + p["up_bias"][e])
                out = neurons @ p["down"][e] + p["down_bias"][e]
                expected[row, time] += weight * out
                if mask[row, time]:
                    importance[e] += weight * np.linalg.norm(out)
                    sums[e], count[e] = sums[e] + np.abs(neurons), count[e] + 1
        mean += sums / np.maximum(count, 1)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(recorded["statistics"]["experts"], importance, rtol=1e-5)
    np.testing.assert_allclose(recorded["statistics"]["expert_neurons"]["first"]["mean"], mean, rtol=1e-4)


def test_a_selection_bias_has_no_gradient():
    config = testing.small_configs()["moe_bias"]
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 12)
    gradients = models.flatten(jax.jit(jax.grad(testing.mean_loss), static_argnums=1)(params, config, batch))
    assert not np.any(gradients["layers/moe/router_bias"])
    assert np.any(gradients["layers/moe/router"])


@pytest.mark.parametrize("router", Router)
def test_ties_pick_the_lowest_index(router):
    logits = jnp.asarray([[0.0] * 7, [1, 2, 2, 2, 0, 2, 1], [-3, -3, -3, -3, -3, -3, 4]], jnp.float32)
    _, index, _ = models.choose_experts(logits, experts(router))
    np.testing.assert_array_equal(index, [[0, 1, 2], [1, 2, 3], [6, 0, 1]])


@pytest.mark.parametrize("router", Router)
def test_weights_within_16_ulps_on_every_back_end(router):
    """Of float64: a softmax or two, and one division; the choice is the same."""
    results = {
        name: models.choose_experts(jnp.asarray(LOGITS), experts(router), backend=name) for name in ("xla", "reference")
    }
    logits = LOGITS.astype(np.float64)
    score = 1 / (1 + np.exp(-logits)) if router is Router.SIGMOID else softmax(logits)
    for weight, index, _ in results.values():
        wanted = np.take_along_axis(score, np.asarray(index), 1)
        wanted = wanted if router is Router.SOFTMAX_TOPK else wanted / wanted.sum(-1, keepdims=True)
        np.testing.assert_allclose(weight, wanted, rtol=16 * 2.0**-23)
        np.testing.assert_array_equal(index, results["xla"][1])


@pytest.mark.parametrize("router", Router)
def test_extreme_logits_stay_finite_with_finite_gradients(router):
    logits = jnp.asarray([[-200.0] * 7, [200.0] * 7, [300.0, -300.0, 0, 0, 0, 0, 0]], jnp.float32)

    def total(x):
        weight, _, probability = models.choose_experts(x, experts(router))
        return jnp.sum(weight**2) + jnp.sum(probability**2)

    value, grad = jax.value_and_grad(total)(logits)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_statistics_match_numpy_and_honour_the_mask():
    e = experts(Router.TOPK_SOFTMAX)
    mask = np.random.default_rng(1).random(40) < 0.6
    weight, index, probability = models.choose_experts(jnp.asarray(LOGITS), e)
    got = router_statistics(jnp.asarray(LOGITS), weight, index, probability, jnp.asarray(mask))
    kept, p = np.asarray(index)[mask], softmax(LOGITS)[mask]
    np.testing.assert_allclose(got.load_E, np.bincount(kept.ravel(), minlength=7) / mask.sum(), rtol=1e-5)
    np.testing.assert_allclose(np.sum(got.load_E), 3, rtol=1e-6)
    np.testing.assert_allclose(got.probability_E, p.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.z, np.mean(np.log(np.exp(LOGITS[mask].astype(np.float64)).sum(-1)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(got.entropy, -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
    np.testing.assert_allclose(got.confidence, np.asarray(weight)[mask].max(-1).mean(), rtol=1e-5)


def test_statistics_of_nothing_are_zero():
    arguments = models.choose_experts(jnp.asarray(LOGITS), experts(Router.SIGMOID))
    got = router_statistics(jnp.asarray(LOGITS), *arguments, jnp.zeros(40, bool))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("router", Router)
def test_a_model_reports_each_layer(router):
    config = testing.moe_config(router)
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    got = testing.run(params, config, batch).router
    assert got.load_E.shape == got.probability_E.shape == (config.layers, 7)
    assert got.z.shape == (config.layers,)
    np.testing.assert_allclose(np.sum(got.load_E, -1), 2, rtol=1e-5)
    np.testing.assert_allclose(np.sum(got.probability_E, -1), 1, rtol=1e-5)
    assert np.std(got.load_E) > 0.01, "random routers are not balanced; if they look so, the layers were mixed up"


def test_permuting_experts_changes_nothing():
    """Renumbering the experts with their router columns is the same model."""
    config = testing.moe_config("softmax_topk")
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    order = np.random.default_rng(3).permutation(7)
    flat = models.flatten(params)
    for name, declaration in models.declarations(config).items():
        if (axis := declaration.axis("experts")) is not None:
            flat[name] = jnp.take(flat[name], order, axis=axis)
    a, b = testing.run(params, config, batch), testing.run(models.unflatten(flat), config, batch)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(np.asarray(a.hidden_BTD)[real], np.asarray(b.hidden_BTD)[real], atol=2e-5)
    np.testing.assert_allclose(np.asarray(a.router.load_E)[:, order], b.router.load_E, atol=1e-6)


def test_the_balance_within_rows_is_the_mean_of_each_row_by_its_tokens():
    rows, time = 5, 8
    mask = np.random.default_rng(2).random(40) < 0.6
    mask[:time] = False  # a row of padding
    weight, index, probability = models.choose_experts(jnp.asarray(LOGITS), experts(Router.TOPK_SOFTMAX))
    in_rows = lambda x: x.reshape(rows, time, *x.shape[1:])  # noqa: E731
    got = router_statistics(jnp.asarray(LOGITS), weight, index, probability, jnp.asarray(mask), in_rows)
    expected = 0.0
    for row in range(1, rows):
        kept = np.arange(row * time, (row + 1) * time)[mask[row * time : (row + 1) * time]]
        load = np.bincount(np.asarray(index)[kept].ravel(), minlength=7) / len(kept)
        expected += len(kept) / mask.sum() * 7 / 3 * np.sum(load * softmax(LOGITS)[kept].mean(0))
    np.testing.assert_allclose(got.sequence_balance, expected, rtol=1e-5)
    even = jnp.zeros((40, 7))
    one_row = router_statistics(even, *models.choose_experts(even, experts(Router.TOPK_SOFTMAX)), jnp.ones(40, bool))
    np.testing.assert_allclose(one_row.sequence_balance, 1.0, rtol=1e-6)  # whatever is chosen
