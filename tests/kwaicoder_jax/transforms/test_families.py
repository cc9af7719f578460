"""What transforms make of biases, norms of queries and keys, windows, groups of experts and latent attention."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import checkpoints, models, testing, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import (
    Target,
    coactivation,
    fold,
    importance,
    optimizer_state,
    prune,
    streaming,
    upcycle,
    verify,
)
from kwaicoder_jax.transforms.costs import Costs

from . import masks, reference
from .upcycling import scores_of

FAMILIES = testing.family_configs()
ONE_STACK = {name: config for name, config in FAMILIES.items() if not config.dense_layers}
ONE_STACK |= {
    "latent": FAMILIES["deepseek_v2"].replace(dense_layers=0, experts=None),
    "latent_mixture": FAMILIES["deepseek_v3"].replace(dense_layers=0, layers=3, qkv_bias=True, out_bias=True),
}
EXACT = 1e-9  # float64 on both sides, and a norm's epsilon of 1e-12


def sizes_of(config):
    """A target that cuts every axis that the family lets go."""
    sizes = {"layers": config.layers - 1, "model_dim": 17}
    if config.qk_norm != "full":
        sizes |= {"heads": config.heads // config.kv_heads, "kv_heads": 1}
    if config.mla is not None:
        sizes |= {"heads": 3, "kv_heads": 3}
    if config.experts is None:
        return sizes | {"mlp_dim": 11}
    return sizes | {"expert_dim": 9} | ({"shared_dim": 6} if config.experts.shared_mlp_dim else {})


@pytest.mark.parametrize("name", ONE_STACK)
def test_a_sliced_model_is_the_masked_one(name):
    config = ONE_STACK[name].replace(norm_epsilon=1e-12)
    sizes = sizes_of(config)
    rng = np.random.default_rng(3)
    params, batch = reference.float64(testing.random_params(config)), testing.random_batch(config, 2, 12)
    kept = masks.draw(rng, config, sizes)
    student, new, record = prune.apply(
        params, config, masks.scores_of(rng, config, kept), Target(**sizes), protect_ends=False
    )
    models.check(student, new)
    assert new == models.ModelConfig.from_dict(record["config_after"])
    full = masks.masked(params, config, kept)
    real = batch["segment_ids"] > 0
    got, expected = (
        testing.reference_logits(student, new, batch)[real],
        testing.reference_logits(full, config, batch)[real],
    )
    assert reference.relative(got, expected) < EXACT


def test_windows_go_with_their_layers():
    config = FAMILIES["qwen2"]
    scores = scores_of(config).replace(layers_L=np.array([0.1, 0.2, 0.9]))
    record = prune.plan(config, scores, Target(layers=2), protect_ends=False)
    assert record["kept"]["layers"] == [1, 2]
    assert record["config_after"]["windows"] == [7, 4]
    assert Target(layers=1).apply(config, [0]).windows == ()


@pytest.mark.parametrize("field", ["heads", "kv_heads"])
def test_heads_of_latent_attention_are_one_size(field):
    resolved = Target(**{field: 3}).resolve(ONE_STACK["latent"])
    assert (resolved.heads, resolved.kv_heads) == (3, 3)


REFUSED = {
    "heads normed together": (
        "olmoe",
        Target(heads=2, kv_heads=1),
        {},
        r"prune\.target\.heads: .*model\.qk_norm is full",
    ),
    "experts of groups": ("latent_mixture", Target(experts=6), {}, r"prune\.target\.experts: .* 2 of 3 groups"),
    "merged heads that are normed": (
        "qwen3",
        Target(heads=3),
        {"head_merge": True},
        r"prune\.head_merge: model\.qk_norm",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pruning_cannot_do_is_refused(case):
    name, target, options, message = REFUSED[case]
    config = ONE_STACK[name]
    kept = masks.draw(np.random.default_rng(0), config, {})
    with pytest.raises(UserError, match=message):
        prune.plan(config, masks.scores_of(np.random.default_rng(0), config, kept), target, **options)


def test_two_stacks_are_neither_measured_nor_cut():
    config = FAMILIES["deepseek_v2"]
    with pytest.raises(UserError, match=r"model\.dense_layers: 1 dense layers"):
        importance.collect(testing.random_params(config), config, [testing.random_batch(config, 2, 12)])
    with pytest.raises(UserError, match=r"model\.dense_layers"):
        Target(layers=2).resolve(config)


@pytest.mark.parametrize("name", ["llama", "deepseek_v2", "mixtral_with_biases"])
def test_leaving_a_layer_out(name):
    """The loss of the float64 reference whose layer writes nothing, biases included."""
    config, batch = FAMILIES[name], testing.random_batch(FAMILIES[name], 2, 12)
    params = testing.random_params(config)
    result = importance.leave_one_out(params, config, [batch])
    for layer in range(config.layers):
        flat = {n: np.array(x) for n, x in models.flatten(params).items()}
        stack, at = ("dense_layers", layer) if layer < config.dense_layers else ("layers", layer - config.dense_layers)
        for n in flat:
            if n.startswith(f"{stack}/") and n.endswith(("/out", "/down", "/out_bias", "/down_bias")):
                flat[n][at] = 0
        logits = testing.reference_logits(models.unflatten(flat), config, batch)
        log_p = np.take_along_axis(np.log(reference.softmax(logits)), batch["targets"][..., None], -1)[..., 0]
        expected = -log_p[batch["loss_mask"] > 0].mean()
        np.testing.assert_allclose(result.loss_L[layer], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ONE_STACK)
def test_costs_of_the_whole_model_are_its_counts(name):
    config = ONE_STACK[name]
    cost = Costs(config).of(Target())
    assert (cost.params, cost.active) == (models.count(config), models.count_active(config))
    sizes = sizes_of(config)
    student = Target(**sizes).apply(config)
    cost = Costs(config).of(Target(**sizes))
    assert (cost.params, cost.active) == (models.count(student), models.count_active(student))


@pytest.mark.parametrize("name", FAMILIES)
def test_matrices_decay_and_nothing_else_does(name):
    declared = models.declarations(FAMILIES[name])
    decaying = {n for n, d in declared.items() if training.optimizer.decays(d)}
    assert decaying == {n for n in declared if not n.endswith(("scale", "bias"))}
    mesh = training.make_mesh(training.MeshConfig(), jax.devices()[:1])
    training.param_shardings(FAMILIES[name], mesh)  # no two axes of a parameter are on one mesh axis


BIASED = FAMILIES["llama"].replace(layers=2, qk_norm="head", windows=(0, 7))
UPCYCLINGS = {
    "balanced": {"top_replicas": 2},
    "sigmoid": {"router": "sigmoid", "routed_scale": 2.5, "scale_placement": "up", "partition": "random_per_replica"},
    "shared": {"shared_neurons": 8, "shared_gate": True, "scale_placement": "down", "partition": "random",
               "scores": scores_of(BIASED)},
}  # fmt: skip


@pytest.fixture(scope="module")
def biased_params():
    return jax.tree.map(np.asarray, testing.random_params(BIASED))


@pytest.mark.parametrize("kind", UPCYCLINGS)
def test_a_dense_model_with_biases_upcycles_without_loss(biased_params, kind, tmp_path):
    options = {"granularity": 4, "replicas": 3, "router_std": 0.3} | UPCYCLINGS[kind]
    moe, config, record = upcycle.apply(biased_params, BIASED, **options)
    assert config.experts.bias
    assert (config.qk_norm, config.windows, config.mlp_bias) == ("head", (0, 7), True)
    batch = testing.random_batch(BIASED, 2, 24)
    assert verify.verify(biased_params, BIASED, moe, config, [batch]).max_relative_logit_error < 1e-5
    # Every expert has the same part of the bias, and a control: without it the function is another one.
    flat = models.flatten(moe)
    part = {"balanced": 1.0, "sigmoid": 1 / 2.5, "shared": 1.0}[kind]
    expected = np.broadcast_to(
        biased_params["layers"]["mlp"]["down_bias"][:, None] * part, flat["layers/moe/down_bias"].shape
    )
    np.testing.assert_allclose(flat["layers/moe/down_bias"], expected, rtol=1e-6)
    broken = models.unflatten(flat | {"layers/moe/down_bias": 2 * flat["layers/moe/down_bias"]})
    assert verify.verify(biased_params, BIASED, broken, config, [batch]).max_relative_logit_error > 1e-2
    # Back again, and the same from disk.
    for replica in (None, fold.AVERAGE):
        back, dense, _ = fold.apply(moe, config, record, replica=replica)
        assert dense == BIASED
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), back, biased_params)
    streaming.run(
        upcycle, checkpoints.from_params(biased_params), tmp_path, record,
        meta={"model": config.to_dict(), "lineage": [], "identity": "moe"},
    )  # fmt: skip
    streamed = checkpoints.open_tensors(tmp_path)
    for name, array in flat.items():
        assert np.array_equal(streamed[name].read(), array), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", UPCYCLINGS)
def test_moments_of_biases_follow_the_gradient(biased_params, kind):
    """k = R and a uniform router: every copy's gradient has a closed form."""
    options = {name: value for name, value in UPCYCLINGS[kind].items() if name != "top_replicas"}
    moe, config, record = upcycle.apply(
        biased_params, BIASED, granularity=4, replicas=3, top_replicas=3, router_init="zeros", **options
    )
    batch = testing.random_batch(BIASED, 2, 24)
    gradients = jax.jit(jax.grad(testing.mean_loss), static_argnums=1)
    dense = gradients(biased_params, BIASED, batch)
    expected = models.flatten(gradients(moe, config, batch))
    moved = optimizer_state.upcycled(dense, jax.tree.map(np.square, dense), BIASED, record)
    first, second = (models.flatten(tree) for tree in moved)
    biases = [name for name in record["factors"] if name.endswith("bias")]
    assert len(biases) == (5 if kind == "shared" else 3)
    for name in biases:
        assert reference.relative(first[name], expected[name]) < 2e-5, name
        assert reference.relative(second[name], np.square(expected[name], dtype=np.float64)) < 4e-5, name


def test_coactivation_counts_neurons_with_their_biases(biased_params):
    """A bias that keeps a neuron large makes it fire on every token."""
    flat = {n: np.array(x) for n, x in models.flatten(biased_params).items()}
    flat["layers/mlp/gate_bias"][:, 3], flat["layers/mlp/up_bias"][:, 3] = 50.0, 50.0
    batch = testing.random_batch(BIASED, 2, 24)
    found = coactivation.collect(models.unflatten(flat), BIASED, [batch])
    np.testing.assert_array_equal(found.fires_LF[:, 3], found.tokens)
