"""Pruning: what may go without a trace, what is kept, and the exact shapes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Scores, Target, importance, prune, upcycle
from kwaicoder_jax.transforms import heads as heads_module

from . import reference

CONFIG = testing.dense_config(layers=4, norm_epsilon=1e-12)
EXACT = 1e-12  # float64


def made_scores(config, seed=0, **given_scores):
    """Random scores of the right shapes; energy shares sum to 1."""
    rng = np.random.default_rng(seed)
    sizes = {"L": config.layers, "D": config.model_dim, "F": config.mlp_dim, "H": config.heads, "K": config.kv_heads}
    arrays = {}
    for field in dataclasses.fields(Scores):
        if field.default is dataclasses.MISSING and field.name not in ("tokens", "sequences", "aggregation"):
            arrays[field.name] = rng.uniform(0.1, 1.0, [sizes[x] for x in field.name.rsplit("_", 1)[1]])
            if "norm" in field.name:
                arrays[field.name] /= arrays[field.name].sum(-1, keepdims=True)
    return Scores(**(arrays | given_scores), tokens=1, sequences=1, aggregation={})


def params_and_batch(config, seed=0):
    return reference.float64(testing.random_params(config, seed)), testing.random_batch(config, 2, 10, seed)


def change(params, name, function):
    flat = models.flatten(params)
    return models.unflatten(flat | {name: function(flat[name].copy())})


def silenced(name, axis, dead):
    """A function that sets the outgoing weights of the units `dead` ([L, n]) to zero."""

    def work(array):
        for layer, units in enumerate(dead):
            for unit in units:
                array[(layer, *[slice(None)] * (axis - 1), unit)] = 0
        return array

    return lambda params: change(params, name, work)


def logits(params, config, batch):
    return reference.forward(params, config, batch)["logits"][batch["segment_ids"] > 0]


def kept_is_one(shape, dead):
    """Scores of 1 for what must stay and 0 for the dead."""
    scores = np.ones(shape)
    np.put_along_axis(scores, np.asarray(dead), 0.0, axis=-1)
    return scores


def test_silent_neurons_leave_no_trace():
    params, batch = params_and_batch(CONFIG)
    dead = [np.random.default_rng(i).permutation(48)[:19] for i in range(4)]
    params = silenced("layers/mlp/down", 1, dead)(params)
    scores = made_scores(CONFIG, neurons_LF=kept_is_one((4, 48), dead))
    student, config, record = prune.apply(params, CONFIG, scores, Target(mlp_dim=29))
    assert reference.relative(logits(student, config, batch), logits(params, CONFIG, batch)) < EXACT
    for layer in range(4):
        assert record["kept"]["mlp"][layer] == sorted(set(range(48)) - set(dead[layer].tolist()))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "to_heads", "to_kv_heads"),
    [(6, 2, 4, 2), (6, 2, 2, 1), (6, 2, 3, 1), (5, 1, 2, 1), (4, 4, 3, 3), (8, 4, 4, 2), (8, 4, 2, 2)],
)
def test_silent_heads_and_groups_leave_no_trace(heads, kv_heads, to_heads, to_kv_heads):
    config = testing.dense_config(layers=2, heads=heads, kv_heads=kv_heads)
    params, batch = params_and_batch(config)
    rng, per_group, stay = np.random.default_rng(heads), heads // kv_heads, []
    for _ in range(config.layers):
        groups = np.sort(rng.permutation(kv_heads)[:to_kv_heads])
        inside = [np.sort(rng.permutation(per_group)[: to_heads // to_kv_heads]) for _ in groups]
        stay.append(np.concatenate([g * per_group + i for g, i in zip(groups, inside)]))
    dead = [np.setdiff1d(np.arange(heads), s) for s in stay]
    params = silenced("layers/attention/out", 1, dead)(params)
    norms_LH = np.linalg.norm(models.flatten(params)["layers/attention/out"], axis=(-1, -2))
    scores = made_scores(config, heads_LH=norms_LH, groups_LK=norms_LH.reshape(2, kv_heads, -1).sum(-1))
    student, new, record = prune.apply(params, config, scores, Target(heads=to_heads, kv_heads=to_kv_heads))
    assert (new.heads, new.kv_heads) == (to_heads, to_kv_heads)
    assert record["kept"]["heads"] == [s.tolist() for s in stay]
    assert reference.relative(logits(student, new, batch), logits(params, config, batch)) < EXACT


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_query_heads_stay_with_their_kv_head(data):
    groups, per_group = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    to_groups, to_per_group = data.draw(st.integers(1, groups)), data.draw(st.integers(1, per_group))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scores_LH, scores_LK = rng.integers(0, 4, (3, groups * per_group)), rng.integers(0, 4, (3, groups))
    heads, kv = heads_module.keep(scores_LH, scores_LK, to_groups * to_per_group, to_groups)
    assert heads.shape == (3, to_groups * to_per_group)
    assert kv.shape == (3, to_groups)
    for layer in range(3):
        assert (np.diff(heads[layer]) > 0).all()
        assert (np.diff(kv[layer]) > 0).all()
        gone = np.setdiff1d(np.arange(groups), kv[layer])
        assert not len(gone) or scores_LK[layer, gone].max() <= scores_LK[layer, kv[layer]].min()
        for new, old in enumerate(heads[layer]):
            assert old // per_group == kv[layer, new // to_per_group]
        for k in kv[layer]:
            all_heads = np.arange(k * per_group, (k + 1) * per_group)
            stay = np.intersect1d(all_heads, heads[layer])
            gone = np.setdiff1d(all_heads, stay)
            assert not len(gone) or scores_LH[layer, gone].max() <= scores_LH[layer, stay].min()


def test_silent_layers_leave_no_trace():
    params, batch = params_and_batch(CONFIG)
    for name in ("layers/mlp/down", "layers/attention/out"):
        params = change(params, name, lambda x: x * np.array([1.0, 0.0, 1.0, 1.0]).reshape(-1, *[1] * (x.ndim - 1)))
    scores = made_scores(CONFIG, layers_L=np.array([0.5, 0.0, 0.4, 0.6]))
    student, config, record = prune.apply(params, CONFIG, scores, Target(layers=3))
    assert record["kept"]["layers"] == [0, 2, 3]
    assert reference.relative(logits(student, config, batch), logits(params, CONFIG, batch)) < EXACT


def test_silent_units_of_every_kind_at_once():
    """Depth and width together: the lists of each layer follow the layer that they were made for."""
    rng = np.random.default_rng(4)
    params, batch = params_and_batch(CONFIG)
    neurons = [rng.permutation(48)[:11] for _ in range(4)]
    heads = [np.concatenate([rng.permutation(3)[:1], 3 + rng.permutation(3)[:1]]) for _ in range(4)]
    params = silenced("layers/mlp/down", 1, neurons)(params)
    params = silenced("layers/attention/out", 1, heads)(params)
    for name in ("layers/mlp/down", "layers/attention/out"):
        params = change(params, name, lambda x: x * np.array([1.0, 0.0, 1.0, 1.0]).reshape(-1, *[1] * (x.ndim - 1)))
    scores = made_scores(
        CONFIG,
        neurons_LF=kept_is_one((4, 48), neurons),
        heads_LH=kept_is_one((4, 6), heads),
        layers_L=np.array([1.0, 0.0, 1.0, 1.0]),
    )
    student, config, _ = prune.apply(params, CONFIG, scores, Target(layers=3, mlp_dim=37, heads=4))
    assert reference.relative(logits(student, config, batch), logits(params, CONFIG, batch)) < EXACT


@pytest.mark.parametrize("tied", [True, False])
def test_masked_equals_sliced_for_channels(tied):
    """With the dropped channels zero everywhere the kept share is 1, and sqrt(D/D') makes the norms agree exactly."""
    config = CONFIG.replace(tie_embeddings=tied)
    params, batch = params_and_batch(config)
    stay = np.sort(np.random.default_rng(3).permutation(32)[:20])
    mask = np.isin(np.arange(32), stay).astype(np.float64)
    for name in ("embedding", "layers/attention/out", "layers/mlp/down"):
        params = change(params, name, lambda x: x * mask)
    share = mask / mask.sum()
    shares = {"attention_norm_LD": np.tile(share, (4, 1)), "mlp_norm_LD": np.tile(share, (4, 1)), "final_norm_D": share}
    student, new, record = prune.apply(
        params, config, made_scores(config, channels_D=mask, **shares), Target(model_dim=20)
    )
    assert record["kept"]["embed"] == stay.tolist()
    assert ("head" in student) is not tied
    np.testing.assert_allclose(record["norm_factors"]["layers/mlp_norm/scale"], np.sqrt(32 / 20), rtol=1e-14)
    assert reference.relative(logits(student, new, batch), logits(params, config, batch)) < 1e-9  # the norm's epsilon
    bare, _, _ = prune.apply(
        params, config, made_scores(config, channels_D=mask, **shares), Target(model_dim=20), norm_correction=False
    )
    assert reference.relative(logits(bare, new, batch), logits(params, config, batch)) > 0.05


def test_norm_correction_is_the_root_of_the_kept_energy_share():
    params, _ = params_and_batch(CONFIG)
    scores = made_scores(CONFIG, 5, layers_L=np.array([3.0, 1.0, 2.0, 3.0]))
    student, _, record = prune.apply(params, CONFIG, scores, Target(layers=3, model_dim=24))
    embed, layers = record["kept"]["embed"], [0, 2, 3]
    before, after = models.flatten(params), models.flatten(student)
    for norm in ("attention_norm", "mlp_norm"):
        for new, old in enumerate(layers):
            share = getattr(scores, f"{norm}_LD")[old]
            factor = np.sqrt(sum(share[c] for c in embed) * 32 / 24)
            name = f"layers/{norm}/scale"
            assert abs(record["norm_factors"][name][new] - factor) < 1e-14
            np.testing.assert_allclose(after[name][new], before[name][old][embed] * factor, rtol=1e-14)
    factor = np.sqrt(sum(scores.final_norm_D[c] for c in embed) * 32 / 24)
    np.testing.assert_allclose(after["final_norm/scale"], before["final_norm/scale"][embed] * factor, rtol=1e-14)


def test_a_norm_that_nothing_entered_is_left_alone():
    share_LD = made_scores(CONFIG).mlp_norm_LD.copy()
    share_LD[2] = 0  # as after calibration on nothing but zeros there
    scores = made_scores(CONFIG, mlp_norm_LD=share_LD, final_norm_D=np.zeros(32))
    with np.errstate(all="raise"):
        record = prune.plan(CONFIG, scores, Target(model_dim=24))
    embed, factors = record["kept"]["embed"], record["norm_factors"]
    expected = np.sqrt(share_LD[:, embed].sum(-1) * 32 / 24)
    expected[2] = 1
    np.testing.assert_allclose(factors["layers/mlp_norm/scale"], expected, rtol=1e-14)
    assert factors["final_norm/scale"] == 1


def test_norm_correction_keeps_the_kept_channels_size():
    """On energy that is spread unevenly, the kept channels leave the norm as large as before (RECIPE, section 2)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 256)) * np.exp(rng.standard_normal(256) * 0.5)
    kept = np.sort(np.argsort(-np.std(x, axis=0))[:128])
    share = np.mean(x**2 / (x**2).sum(-1, keepdims=True), axis=0)
    config = testing.dense_config(layers=1, model_dim=256)
    shares = {"attention_norm_LD": share[None], "mlp_norm_LD": share[None], "final_norm_D": share}
    scores = made_scores(config, channels_D=np.isin(np.arange(256), kept) * 1.0, **shares)
    factor = prune.plan(config, scores, Target(model_dim=128))["norm_factors"]["final_norm/scale"]
    full = reference.rms_norm(x, 1.0, 1e-6)[:, kept]
    sliced = reference.rms_norm(x[:, kept], 1.0, 1e-6)
    plain, corrected = (np.sqrt(np.sum((f * sliced - full) ** 2) / np.sum(full**2)) for f in (1.0, factor))
    assert plain > 0.1
    assert corrected < 0.01 * plain + 0.02
    assert corrected < plain / 10


def test_calibrated_scores_find_the_silent_units():
    """From calibration data to logits in float32, through the model itself."""
    config = testing.dense_config()
    dead_neurons, dead_heads = [[1, 5, 30], [0, 2, 47], [3, 4, 5]], [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    params = silenced("layers/mlp/down", 1, dead_neurons)(reference.float64(testing.random_params(config)))
    params = silenced("layers/attention/out", 1, dead_heads)(params)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    batch = testing.random_batch(config, 3, 16)
    scores = importance.collect(params, config, [batch], weight_aware=True)
    student, new, _ = prune.apply(params, config, scores, Target(mlp_dim=45, heads=3, kv_heads=1))
    assert reference.relative(logits(student, new, batch), logits(params, config, batch)) < EXACT  # the same numbers


EVERYTHING = Target(layers=3, model_dim=24, mlp_dim=40, heads=4, kv_heads=2)


@pytest.mark.parametrize("tied", [True, False])
def test_exact_shapes_record_and_replay(tied):
    config = CONFIG.replace(tie_embeddings=tied)
    params, _ = params_and_batch(config)
    student, new, record = prune.apply(params, config, made_scores(config), EVERYTHING)
    models.check(student, new)
    asked = {name: size for name, size in dataclasses.asdict(EVERYTHING).items() if size is not None}
    assert asked.items() <= new.to_dict().items()
    assert record["params_after"] == sum(x.size for x in jax.tree.leaves(student)) == models.count(new)
    assert record["params_before"] == models.count(config)
    again, same = prune.replay(params, config, json.loads(json.dumps(record)))
    assert same == new
    jax.tree.map(np.testing.assert_array_equal, again, student)
    kept = record["kept"]
    query = models.flatten(params)["layers/attention/query"]
    for i, layer in enumerate(kept["layers"]):
        expected = query[layer][np.ix_(kept["embed"], kept["heads"][i])]
        np.testing.assert_array_equal(models.flatten(student)["layers/attention/query"][i], expected)
        down = models.flatten(params)["layers/mlp/down"][layer][np.ix_(kept["mlp"][i], kept["embed"])]
        np.testing.assert_array_equal(models.flatten(student)["layers/mlp/down"][i], down)


def test_kinds_and_dtypes_are_kept():
    params = jax.tree.map(lambda x: jnp.asarray(x, "bfloat16"), params_and_batch(CONFIG)[0])
    device, config, record = prune.apply(params, CONFIG, made_scores(CONFIG), EVERYTHING)
    host, _, _ = prune.apply(jax.tree.map(np.asarray, params), CONFIG, made_scores(CONFIG), EVERYTHING)
    for a, b in zip(jax.tree.leaves(device), jax.tree.leaves(host)):
        assert isinstance(a, jax.Array)
        assert isinstance(b, np.ndarray)
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(a), b)
    traced = jax.eval_shape(lambda p: prune.replay(p, CONFIG, record)[0], params)
    models.check(traced, config)


def test_nothing_asked_nothing_changed():
    params, _ = params_and_batch(CONFIG)
    student, config, record = prune.apply(params, CONFIG, made_scores(CONFIG), Target())
    assert config == CONFIG
    assert record["norm_factors"] == {}
    jax.tree.map(np.testing.assert_array_equal, student, params)


def test_ends_are_protected_and_ties_keep_the_first():
    scores = made_scores(CONFIG, layers_L=np.array([0.0, 5.0, 4.0, 0.1]), channels_D=np.ones(32))
    kept = prune.plan(CONFIG, scores, Target(layers=3, model_dim=5))["kept"]
    assert kept["layers"] == [0, 1, 3]
    assert kept["embed"] == [0, 1, 2, 3, 4]
    kept = prune.plan(CONFIG, scores, Target(layers=3), protect_ends=False)["kept"]
    assert kept["layers"] == [1, 2, 3]
    assert len(kept["mlp"]) == 3
    assert kept["heads"] == [list(range(6))] * 3


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(layers=5), r"prune\.target\.layers: 5 cannot be kept of 4"),
        (Target(layers=0), r"prune\.target\.layers: 0"),
        (Target(layers=1), r"prune\.target\.layers.*protect_ends"),
        (Target(model_dim=33), r"prune\.target\.model_dim"),
        (Target(mlp_dim=0), r"prune\.target\.mlp_dim"),
        (Target(heads=12), r"prune\.target\.heads"),
        (Target(heads=5), r"prune\.target\.heads: 5 .* one of 2, 4, 6"),
        (Target(kv_heads=1), r"prune\.target\.heads: 6 query heads need 6 .* one of 1, 2, 3"),
        (Target(kv_heads=3), r"prune\.target\.kv_heads: 3"),
    ],
)
def test_impossible_targets_name_the_field(target, words):
    with pytest.raises(UserError, match=words):
        prune.plan(CONFIG, made_scores(CONFIG), target)


def test_wrong_scores_and_models():
    with pytest.raises(UserError, match="neurons_LF has shape"):
        prune.plan(CONFIG, made_scores(CONFIG.replace(mlp_dim=7)), Target())
    broken = made_scores(CONFIG, channels_D=np.full(32, np.nan))
    with pytest.raises(UserError, match="channels_D is not finite"):
        prune.plan(CONFIG, broken, Target())
    with pytest.raises(UserError, match=r"neurons_LF has shape"):
        prune.plan(testing.moe_config(), made_scores(CONFIG), Target())
    record = prune.plan(CONFIG, made_scores(CONFIG), Target())
    other = CONFIG.replace(tie_embeddings=False)
    with pytest.raises(UserError, match="another model"):
        prune.replay(params_and_batch(other)[0], other, record)


@pytest.mark.parametrize("scores", [None, "scores.npz"])
def test_scores_that_are_none(scores):
    with pytest.raises(UserError, match=r"prune.scores: .* are no scores; give what importance.collect returned"):
        prune.apply({}, testing.dense_config(), scores, Target(layers=2))


@pytest.mark.parametrize("batches", [[np.zeros((2, 8), np.int32)], testing.random_batch(testing.dense_config(), 1, 8)])
def test_batches_that_are_none(batches):
    with pytest.raises(UserError, match=r"batches: batch 0 is .*, not a mapping; give a list of mappings"):
        importance.collect(testing.random_params(testing.dense_config()), testing.dense_config(), batches)


def test_a_granularity_that_is_no_whole_number():
    with pytest.raises(UserError, match=r"upcycle.granularity: 4.0 is no whole number"):
        upcycle.apply({}, testing.dense_config(), granularity=4.0, replicas=2)
