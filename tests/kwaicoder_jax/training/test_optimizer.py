"""The optimizer against torch.optim.AdamW, and what decays and at which rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training import OptimizerConfig
from kwaicoder_jax.training.optimizer import decays

CONFIGS = {"dense": testing.dense_config(tie_embeddings=False), "moe": testing.moe_config()}
RATE = training.join([training.PhaseRate(6, 1e-2, 1e-3, 2, "linear")])


def trainable(config):
    projections = {"layers": np.random.default_rng(3).standard_normal((2, 4, 5)).astype(np.float32)}
    return {"model": testing.random_params(config), "projections": jax.tree.map(jnp.asarray, projections)}


def gradients(tree, step, scale):
    rng = np.random.default_rng((step, 17))
    return jax.tree.map(lambda x: (scale * rng.standard_normal(x.shape)).astype(np.float32), tree)


def flat(tree):
    return {**models.flatten(tree["model"]), "projection": tree["projections"]["layers"]}


def one_update(optimizer, gradient, tree):
    return jax.jit(lambda g, t: optimizer.update(g, optimizer.init(t), t)[0])(gradient, tree)


def is_norm(name):
    return name.endswith("norm/scale")


@pytest.mark.parametrize(
    ("kind", "scale"), [("dense", 1.0), ("moe", 1e-6)]
)  # clipped; and so small that epsilon decides
def test_six_steps_follow_torch(kind, scale):
    constants = OptimizerConfig(epsilon=1e-7, weight_decay=0.3, clip_norm=0.5)
    tree = trainable(CONFIGS[kind])
    optimizer = training.make_optimizer(constants, RATE, CONFIGS[kind])
    state = jax.jit(optimizer.init)(tree)
    oracle = {name: torch.tensor(np.asarray(x, np.float64), requires_grad=True) for name, x in flat(tree).items()}
    still = [x for name, x in oracle.items() if is_norm(name) or name == "projection"]
    decaying = [x for name, x in oracle.items() if not (is_norm(name) or name == "projection")]
    groups = [{"params": decaying, "weight_decay": 0.3}, {"params": still, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-7)
    update, apply = jax.jit(optimizer.update), jax.jit(optax.apply_updates)
    for step in range(6):
        gradient = gradients(tree, step, scale)
        updates, state = update(gradient, state, tree)
        tree = apply(tree, updates)
        for name, x in flat(gradient).items():
            oracle[name].grad = torch.tensor(np.asarray(x, np.float64))
        torch.nn.utils.clip_grad_norm_(oracle.values(), 0.5)
        for group in adam.param_groups:
            group["lr"] = float(RATE(jnp.asarray(step)))
        adam.step()
    for name, x in flat(tree).items():  # float32 against float64; steps of 1e-2
        np.testing.assert_allclose(x, oracle[name].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_matrices_decay_and_norm_scales_and_extras_do_not(kind):
    config = CONFIGS[kind]
    assert {name for name, d in models.declarations(config).items() if not decays(d)} == {
        "layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale"
    }  # fmt: skip
    tree = trainable(config)
    optimizer = training.make_optimizer(OptimizerConfig(weight_decay=0.5), lambda step: jnp.asarray(0.1), config)
    updates = one_update(optimizer, jax.tree.map(lambda x: np.zeros_like(x), tree), tree)
    for name, update in flat(updates).items():
        factor = 0.0 if is_norm(name) or name == "projection" else -0.05
        np.testing.assert_allclose(update, factor * flat(tree)[name], rtol=1e-6, err_msg=name)


def test_multipliers_scale_the_whole_update_with_its_decay_exactly():
    config = CONFIGS["moe"]
    tree, multipliers = trainable(config), {"layers/moe/up": 2.0, "embedding": 0.25}
    results = []
    for given in (None, multipliers):
        optimizer = training.make_optimizer(OptimizerConfig(weight_decay=0.5), RATE, config, given)
        results.append(flat(one_update(optimizer, gradients(tree, 0, 1.0), tree)))
    for name, plain in results[0].items():  # powers of two: exact
        np.testing.assert_array_equal(results[1][name], multipliers.get(name, 1.0) * plain, err_msg=name)


def test_a_multiplier_of_no_parameter_is_a_user_error():
    with pytest.raises(UserError, match=r"optimizer.multipliers: 'layers/mlp/up' is not a parameter"):
        training.make_optimizer(OptimizerConfig(), RATE, CONFIGS["moe"], {"layers/mlp/up": 2.0})


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_epsilon_follows_the_size_of_the_gradients(scale):
    """c times the gradients and c times epsilon: the same steps; also where epsilon decides."""
    config, factor = CONFIGS["moe"], 2.0**-3
    tree, constants = trainable(config), OptimizerConfig(clip_norm=1e9, weight_decay=0.1)
    plain = training.make_optimizer(constants, RATE, config)
    scaled = training.make_optimizer(constants, RATE, config, epsilons={"layers/moe/up": factor})
    states = [plain.init(tree), scaled.init(tree)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for step in range(3):
        gradient = gradients(tree, step, scale)
        changed = {**gradient, "model": jax.tree.map(lambda x: x, gradient["model"])}
        changed["model"]["layers"]["moe"]["up"] = factor * gradient["model"]["layers"]["moe"]["up"]
        expected, states[0] = jax.jit(plain.update)(gradient, states[0], tree)
        found, states[1] = jax.jit(scaled.update)(changed, states[1], tree)
        for name, update in flat(expected).items():
            np.testing.assert_allclose(flat(found)[name], update, rtol=1e-5, atol=1e-9, err_msg=name)
