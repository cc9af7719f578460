"""Pruning of mixtures: experts, their neurons, the shared expert, and the axes that a dense model has too."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import ExpertsConfig, Router
from kwaicoder_jax.transforms import Target, prune

from . import masks, reference

EXACT = 1e-9  # float64; the norm's epsilon of 1e-12
CONFIGS = {
    "biased": ExpertsConfig(6, 2, 9, Router.SIGMOID, 2.5, router_bias=True, shared_mlp_dim=7),
    "gated": ExpertsConfig(6, 3, 9, Router.SOFTMAX_TOPK_RENORMALISED, shared_mlp_dim=7, shared_gate=True),
    "mixtral": ExpertsConfig(6, 2, 9),
    "plain_softmax": ExpertsConfig(6, 2, 9, Router.SOFTMAX_TOPK),
}


def model(name, seed=0):
    config = testing.dense_config(
        vocab_size=23, layers=3, model_dim=20, heads=6, kv_heads=2, head_dim=4, norm_epsilon=1e-12,
        experts=CONFIGS[name],
    )  # fmt: skip
    return config, reference.float64(testing.random_params(config, seed))


def never_chosen(params, config, kept):
    """Gives every expert outside `kept` a router logit so low that no token chooses it, and no softmax sees it.

    Channel 0 of the residual stream is 4 for every token and nothing is written to it, so a router row that reads it
    alone is nearly a constant.
    """
    flat = {name: np.array(x) for name, x in models.flatten(params).items()}
    flat["embedding"][:, 0] = 4.0
    flat["layers/mlp_norm/scale"][:, 0] = 1.0
    for name in flat:
        if name.endswith(("out", "down")):
            flat[name][..., 0] = 0
    for layer in range(config.layers):
        gone = np.setdiff1d(np.arange(config.experts.num_experts), kept["experts"][layer])
        flat["layers/moe/router"][layer][:, gone] = 0
        flat["layers/moe/router"][layer][0, gone] = -200.0
        if config.experts.router_bias:
            flat["layers/moe/router_bias"][layer][gone] = -200.0
    return models.unflatten(flat)


def logits(params, config, batch):
    return reference.forward(params, config, batch)["logits"][batch["segment_ids"] > 0]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_sliced_equals_masked(data):
    """Experts that no token chooses, neurons that write nothing, layers, heads, groups, channels: any of them."""
    config, params = model(data.draw(st.sampled_from(sorted(CONFIGS))), data.draw(st.integers(0, 3)))
    e = config.experts
    groups = data.draw(st.integers(1, 2))
    sizes = {"heads": groups * data.draw(st.integers(1, 3)), "kv_heads": groups}
    for field, least, most in (
        ("layers", 1, 3), ("model_dim", 1, 20), ("experts", e.experts_per_token, 6), ("expert_dim", 1, 9),
        ("shared_dim", 1, 7),
    ):  # fmt: skip
        if data.draw(st.booleans()) and (field != "shared_dim" or e.shared_mlp_dim):
            sizes[field] = data.draw(st.integers(least, most))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kept = masks.draw(rng, config, sizes)
    if "experts" in sizes:  # channel 0 carries the constant of `never_chosen`, so it has to stay
        kept["embed"] = np.unique([0, *kept["embed"][1:]])
        sizes["model_dim"] = len(kept["embed"])
        params = never_chosen(params, config, kept)
    full = masks.masked(params, config, kept)
    scores, batch = masks.scores_of(rng, config, kept), testing.random_batch(config, 1, 8)
    student, new, record = prune.apply(full, config, scores, Target(**sizes), protect_ends=False)
    models.check(student, new)
    assert (new.experts.num_experts, new.experts.mlp_dim) == (sizes.get("experts", 6), sizes.get("expert_dim", 9))
    assert new.experts.shared_mlp_dim == sizes.get("shared_dim", e.shared_mlp_dim)
    assert reference.relative(logits(student, new, batch), logits(full, config, batch)) < EXACT
    again, _ = prune.replay(full, config, json.loads(json.dumps(record)))
    for name, array in models.flatten(again).items():
        np.testing.assert_array_equal(array, models.flatten(student)[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_order_of_experts_and_of_their_neurons_does_not_matter(name):
    config, params = model(name)
    e, rng = config.experts, np.random.default_rng(5)
    sizes = {"experts": 4, "expert_dim": 5} | ({"shared_dim": 3} if e.shared_mlp_dim else {})
    scores = masks.scores_of(rng, config, masks.draw(rng, config, sizes))
    flat = {path: np.array(x) for path, x in models.flatten(params).items()}
    experts_LE, neurons_LEF = np.array(scores.experts_LE), np.array(scores.expert_neurons_LEF)
    for layer in range(config.layers):
        order = rng.permutation(e.num_experts)
        for path in ("gate", "up", "down"):
            flat[f"layers/moe/{path}"][layer] = flat[f"layers/moe/{path}"][layer][order]
        flat["layers/moe/router"][layer] = flat["layers/moe/router"][layer][:, order]
        if e.router_bias:
            flat["layers/moe/router_bias"][layer] = flat["layers/moe/router_bias"][layer][order]
        experts_LE[layer], neurons_LEF[layer] = experts_LE[layer][order], neurons_LEF[layer][order]
        for expert in range(e.num_experts):
            inside = rng.permutation(e.mlp_dim)
            for path, axis in (("gate", 1), ("up", 1), ("down", 0)):
                array = flat[f"layers/moe/{path}"]
                array[layer, expert] = np.take(array[layer, expert], inside, axis)
            neurons_LEF[layer, expert] = neurons_LEF[layer, expert][inside]
    renamed = dataclasses.replace(scores, experts_LE=experts_LE, expert_neurons_LEF=neurons_LEF)
    one, new, _ = prune.apply(params, config, scores, Target(**sizes))
    other, same, _ = prune.apply(models.unflatten(flat), config, renamed, Target(**sizes))
    batch = testing.random_batch(config, 1, 8)
    assert same == new
    assert reference.relative(logits(other, new, batch), logits(one, new, batch)) < EXACT


@pytest.mark.parametrize("name", CONFIGS)
def test_one_layer_at_a_time_on_devices_too(name):
    config, params = model(name)
    rng, sizes = np.random.default_rng(6), {"layers": 2, "experts": 4, "expert_dim": 5, "model_dim": 12, "heads": 4}
    scores = masks.scores_of(rng, config, masks.draw(rng, config, sizes))
    student, new, record = prune.apply(params, config, scores, Target(**sizes), protect_ends=False)
    flat = {path: jnp.asarray(x, "float32") for path, x in models.flatten(params).items()}
    for path, whole in models.flatten(student).items():
        for layer in range(new.layers) if path.startswith("layers/") else (None,):
            ((source, place),) = prune.sources(record, path, layer).items()
            given_array = flat[source] if place is None else flat[source][place : place + 1]
            part = prune.parameter(record, path, {source: given_array}, layer)
            expected = whole if layer is None else whole[layer : layer + 1]
            np.testing.assert_allclose(part, expected, rtol=3e-7, atol=1e-30)  # float32's rounding of input and factor


def test_active_experts_are_capped_only_when_asked():
    config, params = model("gated")
    rng = np.random.default_rng(7)
    scores = masks.scores_of(rng, config, masks.draw(rng, config, {"experts": 2}))
    with pytest.raises(UserError, match=r"prune\.target\.experts: a token uses 3 experts of the 2 .*experts_per_token"):
        prune.plan(config, scores, Target(experts=2))
    _, new, _ = prune.apply(params, config, scores, Target(experts=2, experts_per_token=2))
    assert (new.experts.num_experts, new.experts.experts_per_token) == (2, 2)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(mlp_dim=3), r"prune\.target\.mlp_dim: the model has no mlp_dim.*expert_dim"),
        (Target(shared_dim=2), r"prune\.target\.shared_dim: the model has no"),
        (Target(experts=7), r"prune\.target\.experts: 7 cannot be kept of 6"),
        (Target(expert_dim=0), r"prune\.target\.expert_dim: 0"),
        (Target(experts_per_token=3), r"prune\.target\.experts_per_token: 3 cannot be kept of 2"),
    ],
)
def test_impossible_targets_name_the_field(target, words):
    config, _ = model("mixtral")
    rng = np.random.default_rng(8)
    scores = masks.scores_of(rng, config, masks.draw(rng, config, {}))
    with pytest.raises(UserError, match=words):
        prune.plan(config, scores, target)


def test_scores_that_lack_what_is_asked_say_so():
    config, _ = model("mixtral")
    rng = np.random.default_rng(9)
    scores = masks.scores_of(rng, config, masks.draw(rng, config, {}))
    bare = dataclasses.replace(scores, experts_LE=None, expert_neurons_LEF=None)
    with pytest.raises(UserError, match=r"prune\.target\.experts: the scores have no experts_LE"):
        prune.plan(config, bare, Target(experts=3))
    with pytest.raises(UserError, match=r"prune\.target\.expert_dim: the scores have no expert_neurons_LEF"):
        prune.plan(config, bare, Target(expert_dim=3))
    assert prune.plan(config, bare, Target(heads=4))["kept"].keys() == {"layers", "embed", "heads", "kv_heads"}
