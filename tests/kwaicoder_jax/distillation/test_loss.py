"""The whole distillation loss against one that is put together from plain parts."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import distillation, models, testing, transforms
from kwaicoder_jax.distillation import DistillConfig
from tests.kwaicoder_jax.distillation import reference
from tests.kwaicoder_jax.training import devices

TEACHER = testing.dense_config()
MIXTURE = testing.moe_config()
STUDENT = testing.dense_config(layers=2, model_dim=20, mlp_dim=28, heads=4)
PAIRS = ((0, 0), (1, 2))
ALL = DistillConfig(temperature=2.0, cross_entropy=0.3)
KEPT = np.random.default_rng(0).permutation(32)[:20].tolist()
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32 gradients through the whole model, sums in another order


def trainable(student=STUDENT, pairs=PAIRS, kept=KEPT, noise=0.1):
    projections = distillation.initial_projections(pairs, kept, TEACHER.model_dim)
    rng = np.random.default_rng(1)
    projections = jax.tree.map(lambda x: x + noise * rng.standard_normal(x.shape).astype(np.float32), projections)
    return {"model": testing.random_params(student, seed=5), "projections": projections}


def loss(tree, batch, teacher, config, *, student=STUDENT, teacher_config=TEACHER, pairs=PAIRS, **more):
    options = {"student_config": student, "teacher_config": teacher_config, "pairs": pairs, "config": config, **more}
    return distillation.distillation_loss(tree, batch, teacher, **options, runtime=models.Runtime())


@functools.cache
def value_and_grad(config, **options):
    """(value, metrics), gradients by trainable and teacher; compiled once per config, which is what takes the time."""
    return jax.jit(
        jax.value_and_grad(functools.partial(loss, config=config, **options), (0, 2), has_aux=True),
        compiler_options=devices.QUICK,
    )


def plain_parts(tree, batch, teacher, *, temperature):
    """KL per token, mean relative squared error of embedding and layers, and cross-entropy per token, written plainly."""
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    a = models.forward(tree["model"], STUDENT, *inputs, collect_layers=True)
    b = models.forward(teacher, TEACHER, *inputs, collect_layers=True)
    mask, tokens = batch["loss_mask"], batch["loss_mask"].sum()
    logits = models.logits(a.hidden_BTD, models.projection(tree["model"]))
    guide = jax.nn.log_softmax(models.logits(b.hidden_BTD, models.projection(teacher)) / temperature)
    kl = temperature**2 * jnp.sum(jnp.exp(guide) * (guide - jax.nn.log_softmax(logits / temperature)), -1)
    states = [(a.embedded_BTD @ tree["projections"]["embedding"], b.embedded_BTD)]
    for number, (i, j) in enumerate(PAIRS):
        states.append((a.layers_LBTD[i] @ tree["projections"]["layers"][number], b.layers_LBTD[j]))
    weight = mask[..., None]
    hidden = sum(jnp.sum(weight * (x - y) ** 2) / jnp.sum(weight * y**2) for x, y in states) / len(states)
    labels = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    return jnp.sum(mask * kl) / tokens, hidden, jnp.sum(mask * labels) / tokens


parts = jax.jit(plain_parts, static_argnames="temperature", compiler_options=devices.QUICK)


@pytest.fixture(scope="module")
def setting():
    return trainable(), testing.random_batch(TEACHER, 3, 16), testing.random_params(TEACHER)


def test_value_metrics_and_the_dynamic_weight(setting):
    (value, metrics), _ = value_and_grad(ALL)(*setting)
    kl, hidden, labels = (float(x) for x in parts(*setting, temperature=2.0))
    assert set(metrics) == {"loss", "tokens", "hidden_loss", "hidden_weight", "cross_entropy"}
    np.testing.assert_allclose(metrics["loss"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["hidden_loss"], hidden, rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], labels, rtol=1e-5)
    np.testing.assert_allclose(metrics["hidden_weight"] * metrics["hidden_loss"], metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(value, 2 * kl + 0.3 * labels, rtol=1e-5)
    assert metrics["tokens"] == setting[1]["loss_mask"].sum()


def test_the_dynamic_weight_carries_no_gradient(setting):
    tree, batch, teacher = setting
    kl, hidden, _ = (float(x) for x in parts(*setting, temperature=2.0))

    def with_constant_weight(tree):
        a, b, labels = plain_parts(tree, batch, teacher, temperature=2.0)
        return a + kl / hidden * b + 0.3 * labels

    expected = jax.jit(jax.grad(with_constant_weight), compiler_options=devices.QUICK)(tree)
    _, (got, _) = value_and_grad(ALL)(*setting)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    # With its gradient, alpha * hidden would be the KL again: the projections would get none.
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(got["projections"]))


def test_without_hidden_states_and_labels_it_is_the_kl_alone(setting):
    (value, metrics), (gradients, _) = value_and_grad(DistillConfig(temperature=2.0, hidden=False))(*setting)
    assert set(metrics) == {"loss", "tokens"}
    assert value == metrics["loss"]
    np.testing.assert_allclose(value, parts(*setting, temperature=2.0)[0], rtol=1e-5)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradients["projections"]))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(setting, kind):
    _, batch, teacher = setting
    pairs = tuple((i, i) for i in range(TEACHER.layers))
    tree = {**trainable(TEACHER, pairs, range(32), noise=0), "model": teacher}
    function = value_and_grad(DistillConfig(hidden_loss=kind), student=TEACHER, pairs=pairs)
    (value, metrics), gradients = function(tree, batch, teacher)
    np.testing.assert_allclose([value, metrics["loss"], metrics["hidden_loss"]], 0, atol=1e-6)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_masked_targets_and_the_teacher_get_no_gradient(setting):
    tree, batch, teacher = setting
    other = {**batch, "targets": np.where(batch["loss_mask"] > 0, batch["targets"], 96).astype(np.int32)}
    a, b = (value_and_grad(ALL)(tree, each, teacher) for each in (batch, other))
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(a[1][1]))
    assert all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_batch_without_targets_gives_zero(setting):
    tree, batch, teacher = setting
    empty = {**batch, "loss_mask": np.zeros_like(batch["loss_mask"])}
    (value, _), gradients = value_and_grad(ALL)(tree, empty, teacher)
    assert value == 0
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(gradients))


def top_k_of(teacher, batch, config, count):
    """The arrays that a cache adds to a batch, from whole logits in float64."""
    output = testing.run(teacher, config, batch)
    scores = np.asarray(models.logits(output.hidden_BTD, models.projection(teacher)), np.float64)
    ids = np.argsort(-scores, -1, kind="stable")[..., :count]
    p = reference.log_softmax(scores)
    best = np.take_along_axis(p, ids, -1)
    arrays = {"ids_BTK": ids.astype(np.int32), "log_p_BTK": best, "log_tail_BT": np.log1p(-np.exp(best).sum(-1))}
    return {name: x if x.dtype == np.int32 else x.astype(np.float32) for name, x in arrays.items()}


@pytest.mark.parametrize("form", ["forward_kl", "jensen_shannon"])
def test_stored_logits_train_as_the_live_teacher_does(setting, form):
    tree, batch, teacher = setting
    config = DistillConfig(hidden=False, logits_loss=form, top_k=7, cross_entropy=0.3)
    live = value_and_grad(config)(*setting)
    stored = value_and_grad(config, teacher_config=None)(tree, batch | top_k_of(teacher, batch, TEACHER, 7), {})
    assert set(stored[0][1]) == {"loss", "tokens", "cross_entropy"}
    for a, b in zip(jax.tree.leaves((stored[0], stored[1][0])), jax.tree.leaves((live[0], live[1][0]))):
        np.testing.assert_allclose(a, b, **CLOSE)


def balance(router):
    """A loss that has a closed form of its own, on what a router reports."""
    return 0.5 * jnp.mean(router.z), {"router_z_loss": jnp.mean(router.z)}


@pytest.mark.parametrize(
    ("student", "teacher"), [(MIXTURE, TEACHER), (STUDENT, MIXTURE), (MIXTURE, MIXTURE)], ids=("to", "from", "both")
)
def test_mixtures_teach_and_are_taught(student, teacher):
    """Dense into mixture, mixture into dense, mixture into mixture; the balance of the student's routers is added."""
    pairs = tuple((i, i) for i in range(student.layers))
    kept = range(student.model_dim)
    tree, guide = trainable(student, pairs, kept), testing.random_params(teacher)
    batch = testing.random_batch(teacher, 2, 12)
    options = {"student": student, "teacher_config": teacher, "pairs": pairs}
    function = value_and_grad(DistillConfig(), router_loss=balance, **options)
    (value, metrics), (gradients, of_teacher) = function(tree, batch, guide)
    z = np.mean(testing.run(tree["model"], student, batch).router.z) if student.experts else 0.0
    np.testing.assert_allclose(value, 2 * metrics["loss"] + 0.5 * z, rtol=1e-5)
    assert ("router_z_loss" in metrics) == (student.experts is not None)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradients["model"]))
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(of_teacher))
    without, _ = value_and_grad(DistillConfig(), **options)(tree, batch, guide)
    np.testing.assert_allclose(without[0], 2 * metrics["loss"], rtol=1e-5)


def test_a_pruned_student_s_embedding_is_the_selection_of_its_teacher_s():
    """Decision 8: the residual stream's kept channels stay at their scale, so the 0/1 matrix needs no further factor."""
    teacher, batch = testing.random_params(TEACHER), testing.random_batch(TEACHER, 2, 16)
    scores = transforms.importance.collect(teacher, TEACHER, [batch])
    target = transforms.Target(model_dim=20)
    student, config, record = transforms.prune.apply(teacher, TEACHER, scores, target, norm_correction=True)
    kept = record["kept"]["embed"]
    matrix = distillation.selection_matrix(kept, TEACHER.model_dim)
    ours, theirs = (testing.run(p, c, batch).embedded_BTD for p, c in ((student, config), (teacher, TEACHER)))
    np.testing.assert_array_equal(ours @ matrix, np.where(np.isin(np.arange(32), kept), theirs, 0))


def test_states_of_layers_that_are_not_compared_are_not_stacked():
    """Of a teacher whose layers are unrolled: the compiled text has no array of all its layers' states."""
    teacher, batch = testing.dense_config(layers=12), testing.random_batch(TEACHER, 4, 24)
    pairs, params = ((0, 3), (1, 11)), testing.random_params(teacher)
    tree = trainable(STUDENT, pairs)
    function = functools.partial(
        distillation.distillation_loss, student_config=STUDENT, teacher_config=teacher, pairs=pairs,
        config=DistillConfig(), runtime=models.Runtime(scan_unroll=0),
    )  # fmt: skip
    text = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(tree, batch, params).compile().as_text()
    assert "f32[2,4,24,32]" in text, "the compared states are not where this test looks for them"
    assert "f32[12,4,24,32]" not in text


def test_the_teacher_is_not_quantised(setting):
    """Seven projections of the student in 8 bits, in one layer of its stack, and none of the teacher's."""
    run = functools.partial(
        distillation.distillation_loss, student_config=STUDENT, teacher_config=TEACHER, pairs=PAIRS, config=ALL,
        runtime=models.Runtime(quantization="int8"),
    )  # fmt: skip
    text = jax.jit(run).lower(*setting).as_text()
    assert len(re.findall(r"dot_general .*xi8>, tensor<[^>]*xi8>", text)) == 7
