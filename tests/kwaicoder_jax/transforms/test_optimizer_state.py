"""Adam's moments through upcycling and pruning, held against gradients and steps of the models themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import optimizer_state, prune, upcycle
from tests.kwaicoder_jax.transforms import upcycling
from tests.kwaicoder_jax.transforms.reference import relative

CONFIG = testing.dense_config(layers=2)
PARAMS = testing.random_params(CONFIG)
BATCH = testing.random_batch(CONFIG, 4, 24)
GRADIENTS = jax.jit(jax.grad(testing.mean_loss), static_argnums=1)
ALL_REPLICAS = {"granularity": 4, "replicas": 3, "top_replicas": 3, "router_init": "zeros"}


def squared(tree):
    return jax.tree.map(jnp.square, tree)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"scale_placement": "down", "partition": "random_per_replica"}, marks=pytest.mark.slow),
        pytest.param({"router": "sigmoid", "routed_scale": 2.5, "scale_placement": "up"}, marks=pytest.mark.slow),
        {"shared_neurons": 12, "shared_gate": True, "scores": upcycling.SCORES, "partition": "random_per_replica"},
    ],
    ids=["balanced", "down", "sigmoid", "shared"],
)
def test_a_gradient_goes_to_where_the_mixture_s_own_gradient_is(options):
    """k = R and a uniform router: every copy's gradient is g / (s*R), so m' and v' have a closed form to be held to."""
    moe, moe_config, record = upcycle.apply(PARAMS, CONFIG, **ALL_REPLICAS, **options)
    dense = GRADIENTS(PARAMS, CONFIG, BATCH)
    expected = models.flatten(GRADIENTS(moe, moe_config, BATCH))
    for choice in optimizer_state.SecondMoment:  # k = R: no difference between them
        first, second = optimizer_state.upcycled(dense, squared(dense), CONFIG, record, second_moment=choice)
        models.check(first, moe_config)
        for name, m in models.flatten(first).items():
            if name in record["factors"] or name in models.declarations(CONFIG):
                assert relative(m, expected[name]) < 2e-5, name  # float32 gradients, summed in another order
                assert relative(models.flatten(second)[name], np.square(expected[name], dtype=np.float64)) < 4e-5, name
            else:
                assert not np.any(m), name
                assert not np.any(models.flatten(second)[name]), name


def test_the_second_moment_lies_between_signal_and_noise():
    _, _, record = upcycle.apply(PARAMS, CONFIG, granularity=4, replicas=8, top_replicas=2)
    name, s = "layers/moe/up", 2.0
    found = {c: optimizer_state.moment_factors(record, c)[name] for c in optimizer_state.SecondMoment}
    assert found["signal"] == pytest.approx((1 / (s * 8), 1 / (s * 8) ** 2))
    assert found["noise"] == pytest.approx((1 / (s * 8), 1 / (s**2 * 8 * 2)))
    assert found["between"][1] == pytest.approx((found["signal"][1] * found["noise"][1]) ** 0.5)
    assert optimizer_state.rate_multipliers(record)["layers/moe/gate"] == 1.0
    assert optimizer_state.epsilon_factors(record)[name] == pytest.approx(1 / (s * 8))
    with pytest.raises(UserError, match=r"upcycle\.second_moment"):
        optimizer_state.moment_factors(record, "loud")


def trained(steps=3):
    """A dense model and its optimizer state after a few steps: moments that are neither zero nor one gradient."""
    optimizer = training.make_optimizer(CONSTANTS, lambda step: jnp.asarray(1e-2), CONFIG)
    tree = {"model": PARAMS}
    state = optimizer.init(tree)
    for step in range(steps):
        batch = testing.random_batch(CONFIG, 4, 24, seed=step)
        updates, state = jax.jit(optimizer.update)({"model": GRADIENTS(tree["model"], CONFIG, batch)}, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


CONSTANTS = training.OptimizerConfig(weight_decay=0.0, clip_norm=1e9, epsilon=1e-5)  # an epsilon that can be felt


def one_step(tree, config, adam, **scales):
    optimizer = training.make_optimizer(CONSTANTS, lambda step: jnp.asarray(1e-2), config, **scales)
    fresh = optimizer.init(tree)
    state = (fresh[0], adam, *fresh[2:])
    gradient = {"model": GRADIENTS(tree["model"], config, BATCH)}
    updates, _ = jax.jit(optimizer.update)(gradient, state, tree)
    return optax.apply_updates(tree, updates)


def carried(router_init):
    """The dense model one step on, and the mixture one step on with the dense model's moments."""
    tree, state = trained()
    options = ALL_REPLICAS | {"router_init": router_init, "router_std": 0.3}
    moe, moe_config, record = upcycle.apply(tree["model"], CONFIG, **options)
    adam = state[1]  # behind clipping
    moments = optimizer_state.upcycled(adam.mu["model"], adam.nu["model"], CONFIG, record)
    carried_adam = adam._replace(mu={"model": moments[0]}, nu={"model": moments[1]})
    # The router stands still: with equal replicas its gradient is rounding, which Adam would make a step of.
    multipliers = optimizer_state.rate_multipliers(record) | {"layers/moe/router": 0.0}
    epsilons = optimizer_state.epsilon_factors(record)
    dense = one_step(tree, CONFIG, adam)["model"]
    mixture = one_step({"model": moe}, moe_config, carried_adam, multipliers=multipliers, epsilons=epsilons)["model"]
    return tree["model"], dense, moe, mixture, moe_config, record


def test_with_all_replicas_and_a_uniform_router_the_first_step_is_the_dense_one():
    before, dense, moe, mixture, moe_config, record = carried("zeros")
    expected = models.flatten(upcycle.replay(dense, CONFIG, record)[0])  # s times the dense model one step on
    for name, value in models.flatten(mixture).items():
        moved = np.abs(expected[name] - models.flatten(moe)[name]).max()
        assert name == "layers/moe/router" or moved > 1e-3
        np.testing.assert_allclose(value, expected[name], atol=2e-4 * moved + 1e-7, rtol=0, err_msg=name)
    logits = testing.model_logits(dense, CONFIG, BATCH)
    assert relative(testing.model_logits(mixture, moe_config, BATCH), logits) < 1e-5
    assert relative(testing.model_logits(before, CONFIG, BATCH), logits) > 1e-2  # the step was one


def test_with_a_random_router_it_is_not():
    _, _, moe, mixture, _, record = carried("normal")
    _, dense, *_ = carried("zeros")
    expected = models.flatten(upcycle.replay(dense, CONFIG, {**record, "router_init": "normal"})[0])
    for name in record["factors"]:
        old = np.asarray(models.flatten(moe)[name])
        step, dense_step = np.asarray(models.flatten(mixture)[name]) - old, np.asarray(expected[name]) - old
        off = np.linalg.norm(step - dense_step) / np.linalg.norm(dense_step)
        assert 0.1 < off < 0.9, (name, off)


def test_dropped_neurons_start_without_moments():
    options = {"granularity": 4, "replicas": 2, "drop_ratio": 0.5, "drop_replicas": [1], "allow_lossy": True}
    moe, _, record = upcycle.apply(PARAMS, CONFIG, **options)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    plain = models.flatten(upcycle.apply(PARAMS, CONFIG, **options | {"drop_ratio": 0.0})[0])
    first = models.flatten(optimizer_state.upcycled(ones, ones, CONFIG, record)[0])
    for name in record["factors"]:
        redrawn = np.asarray(models.flatten(moe)[name]) != np.asarray(plain[name])
        assert redrawn.any()
        np.testing.assert_array_equal(np.asarray(first[name]) == 0, redrawn)


def test_a_merged_head_keeps_its_own_moments():
    """2a - b of second moments could be negative."""
    target, scores = prune.Target(heads=4), upcycling.scores_of()
    _, _, record = prune.apply(PARAMS, CONFIG, scores, target, head_merge=True)
    assert record["merged_heads"]
    second = optimizer_state.pruned(squared(PARAMS), squared(PARAMS), CONFIG, record)[1]
    assert all(np.all(np.asarray(x) >= 0) for x in jax.tree.leaves(second))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_pruned_moments_are_those_of_the_kept_units(kind):
    scores = upcycling.scores_of()
    tree = jax.tree.map(lambda x: kind(np.asarray(x)), PARAMS)
    target = prune.Target(model_dim=20, mlp_dim=30, heads=4)
    student, student_config, record = prune.apply(tree, CONFIG, scores, target)
    first, second = optimizer_state.pruned(tree, tree, CONFIG, record)
    models.check(first, student_config)
    for name, value in models.flatten(student).items():
        power = 2 if name in record["norm_factors"] else 0  # the student's norm is c * w, its moments w / c and w / c^2
        c = np.asarray(record["norm_factors"].get(name, 1.0))
        c = c[:, None] if c.ndim else c
        np.testing.assert_allclose(models.flatten(first)[name] * c**power, value, rtol=1e-6, err_msg=name)
        power = 3 if power else 0
        np.testing.assert_allclose(models.flatten(second)[name] * c**power, value, rtol=1e-6, err_msg=name)
        assert isinstance(value, np.ndarray) == isinstance(models.flatten(first)[name], np.ndarray)
