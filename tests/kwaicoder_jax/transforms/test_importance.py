"""Scores of dense models against raw activations of the float64 reference."""

import dataclasses

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import importance

from . import raw_activations, reference

CONFIG = testing.dense_config()
TOLERANCE = 2e-5  # float32 sums over some hundred tokens
# A variance is a difference of sums of its own size squared, so it keeps fewer digits.
KINDS = [(b, s, 1e-3 if "var" in (b, s) else TOLERANCE) for b in ("mean", "l2", "var") for s in ("mean", "l2", "var")]
NORMS = ("attention_norm_out", "mlp_norm_out", "final_norm_out")


def make_batches(config):
    made = [testing.random_batch(config, 3, 16, seed) for seed in (0, 1)]
    made[1] = {name: x.copy() for name, x in made[1].items()}
    made[1]["segment_ids"][2] = 0  # a row of padding is not a sequence
    return made


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG)


@pytest.fixture(scope="module")
def batches():
    return make_batches(CONFIG)


@pytest.fixture(scope="module")
def measured(params, batches):
    return importance.measure(params, CONFIG, batches, blocks=True)


@pytest.fixture(scope="module")
def raw(params, batches):
    return raw_activations.of(params, CONFIG, batches)


@pytest.mark.parametrize(("batch", "sequence", "tolerance"), KINDS)
def test_width_scores(measured, raw, batch, sequence, tolerance):
    scores = measured.scores(batch, sequence)
    for name in ("neurons", "heads", "groups"):
        field = {"neurons": "neurons_LF", "heads": "heads_LH", "groups": "groups_LK"}[name]
        expected = raw_activations.over_layers(raw[name], batch, sequence)
        assert reference.relative(getattr(scores, field), expected) < tolerance, name
    channels_D = sum(raw_activations.over_layers(raw[name], batch, sequence).sum(0) for name in NORMS)
    assert reference.relative(scores.channels_D, channels_D) < tolerance
    assert scores.aggregation == {"batch": batch, "sequence": sequence, "weight_aware": False}


def test_default_is_minitron(measured, raw):
    expected = np.sqrt(sum(np.mean(np.abs(x), axis=0) ** 2 for x in raw["neurons"][1]))
    assert reference.relative(measured.scores().neurons_LF[1], expected) < TOLERANCE


def test_layers_energy_and_counts(measured, raw, batches):
    scores = measured.scores()
    assert scores.tokens == sum(int((b["segment_ids"] > 0).sum()) for b in batches)
    assert scores.sequences == 5
    for i in range(CONFIG.layers):
        assert abs(scores.layers_L[i] - raw_activations.influence(raw["in"][i], raw["out"][i])) < 1e-5
        for field, name in (("attention_norm_LD", "attention_norm_in"), ("mlp_norm_LD", "mlp_norm_in")):
            expected = raw_activations.energy_share(raw[name][i])
            assert reference.relative(getattr(scores, field)[i], expected) < TOLERANCE
    assert reference.relative(scores.final_norm_D, raw_activations.energy_share(raw["final_norm_in"][0])) < TOLERANCE


LAYOUTS = [{"heads": 4, "kv_heads": 4}, {"heads": 5, "kv_heads": 1}, {"kv_heads": 2, "head_dim": 22}]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_groups_of_other_layouts(changes):
    """A KV head each, one KV head, and groups wider than the model."""
    config = testing.dense_config(layers=1, **changes)
    params, batches = testing.random_params(config), make_batches(config)
    scores = importance.collect(params, config, batches)
    expected = raw_activations.of(params, config, batches)
    for field, name in (("groups_LK", "groups"), ("heads_LH", "heads")):
        values = raw_activations.over_layers(expected[name], "l2", "mean")
        assert reference.relative(getattr(scores, field), values) < TOLERANCE, name


@pytest.mark.parametrize("sequence", ["mean", "var"])
def test_one_reduction_alone_is_the_same(params, batches, measured, sequence):
    alone = importance.measure(params, CONFIG, batches, sequence=sequence)
    same(alone.scores("mean", sequence), measured.scores("mean", sequence).replace(blocks_LL=None))
    with pytest.raises(UserError, match=r"prune\.importance\.sequence: 'l2' was not measured; it has "):
        alone.scores("mean", "l2")


def test_weight_aware(measured, params):
    plain, aware = measured.scores(), measured.scores(weight_aware=True)
    row_LF = np.linalg.norm(models.flatten(reference.float64(params))["layers/mlp/down"], axis=-1)
    assert reference.relative(aware.neurons_LF, plain.neurons_LF * row_LF) < TOLERANCE
    np.testing.assert_array_equal(aware.heads_LH, plain.heads_LH)


def test_scores_permute_with_the_units(params, batches, measured):
    rng = np.random.default_rng(0)
    neurons, groups, inside = rng.permutation(CONFIG.mlp_dim), np.array([1, 0]), np.array([2, 0, 1])
    heads = (groups[:, None] * 3 + inside).ravel()
    channels = rng.permutation(CONFIG.model_dim)
    by_axis = {"mlp": neurons, "heads": heads, "kv_heads": groups, "embed": channels}
    flat = {name: np.asarray(x) for name, x in models.flatten(params).items()}
    for name, d in models.declarations(CONFIG).items():
        for axis, order in by_axis.items():
            if axis in d.axes:
                flat[name] = np.take(flat[name], order, d.axes.index(axis))
    before = measured.scores()
    after = importance.collect(models.unflatten(flat), CONFIG, batches, blocks=True)
    orders = {"F": neurons, "H": heads, "K": groups, "D": channels}
    for field in dataclasses.fields(before):
        value = getattr(before, field.name)
        if isinstance(value, np.ndarray):
            expected = value[..., orders[field.name[-1]]] if field.name[-1] in orders else value
            assert reference.relative(getattr(after, field.name), expected) < TOLERANCE, field.name


def same(got, expected, tolerance=TOLERANCE):
    for field in dataclasses.fields(expected):
        value = getattr(expected, field.name)
        if isinstance(value, np.ndarray):
            assert reference.relative(getattr(got, field.name), value) < tolerance, field.name
        else:
            assert getattr(got, field.name) == value, field.name


def test_batch_borders_do_not_matter(params, batches, measured):
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    mixed = [{name: x[rows] for name, x in joined.items()} for rows in ([5, 0, 4], [2, 1, 3])]
    same(importance.collect(params, CONFIG, mixed, blocks=True), measured.scores())


def test_padding_does_not_count(params, batches, measured):
    """Other tokens in the padding, and more of it, change nothing."""
    padded = []
    for batch in batches:
        wide = {name: np.pad(x, ((0, 1), (0, 5))) for name, x in batch.items()}
        padded.append(wide | {"inputs": np.where(wide["segment_ids"] > 0, wide["inputs"], 11)})
    same(importance.collect(params, CONFIG, padded, blocks=True), measured.scores())


def test_scores_without_runs_of_layers_are_the_same(params, batches, measured):
    scores = importance.collect(params, CONFIG, batches)
    assert scores.blocks_LL is None
    same(scores, measured.scores().replace(blocks_LL=None))


def test_save_and_load(measured, tmp_path):
    scores = measured.scores("var", "l2", True).replace(leave_one_out_L=np.arange(3.0))
    scores.save(tmp_path / "deep" / "scores.npz")
    back = importance.Scores.load(tmp_path / "deep" / "scores.npz")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.npz"]
    for field in dataclasses.fields(scores):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(scores, field.name))
    assert back.experts_LE is None
    (tmp_path / "other.npz").write_text("no")
    for name in ("other.npz", "absent.npz"):
        for kind in (importance.Scores, importance.Measurements):
            with pytest.raises(UserError, match=name):
                kind.load(tmp_path / name)


def test_scores_of_an_older_version_load(measured, tmp_path):
    """A file without the fields that came later, as it was written then."""
    scores = measured.scores()
    old = [f.name for f in dataclasses.fields(scores) if f.default is dataclasses.MISSING]
    arrays = {n: getattr(scores, n) for n in old if isinstance(getattr(scores, n), np.ndarray)}
    meta = '{"aggregation": {"batch": "l2", "sequence": "mean", "weight_aware": false}, "sequences": 5, "tokens": 68}'
    np.savez(tmp_path / "scores.npz", meta=np.array(meta), **arrays)
    same(importance.Scores.load(tmp_path / "scores.npz"), scores.replace(blocks_LL=None), 1e-15)


def test_measurements_are_used_again(measured, tmp_path):
    measured.save(tmp_path / "measured.npz")
    back = importance.Measurements.load(tmp_path / "measured.npz")
    assert back.config == CONFIG
    for kind in (("l2", "mean", True), ("var", "l2", False), ("mean", "var", True)):
        same(back.scores(*kind), measured.scores(*kind), 1e-15)


def test_errors(params, batches, measured):
    with pytest.raises(UserError, match="batches: no tokens"):
        importance.collect(params, CONFIG, [])
    with pytest.raises(UserError, match="'segment_ids'"):
        importance.collect(params, CONFIG, [{"inputs": 1, "positions": 1}])
    with pytest.raises(UserError, match=r"prune\.importance\.sequence: no aggregation 'median'"):
        importance.collect(params, CONFIG, batches, sequence="median")
    with pytest.raises(UserError, match=r"prune\.importance\.batch"):
        measured.scores("max")
    with pytest.raises(UserError, match="not a parameter of this config"):
        importance.collect(params, testing.moe_config(), batches)
