"""Scores against raw activations of the float64 reference."""

import dataclasses

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import importance

from . import reference

CONFIG = testing.dense_config()
TOLERANCE = 2e-5  # float32 sums over some hundred tokens


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG)


@pytest.fixture(scope="module")
def batches():
    made = [testing.random_batch(CONFIG, 3, 16, seed) for seed in (0, 1)]
    made[1] = {name: x.copy() for name, x in made[1].items()}
    made[1]["segment_ids"][2] = 0  # a row of padding is not a sequence
    return made


@pytest.fixture(scope="module")
def measured(params, batches):
    return importance.measure(params, CONFIG, batches)


@pytest.fixture(scope="module")
def raw(params, batches):
    """Every layer's activations, as one list of sequences without padding: {name: [layer][sequence] -> [tokens, U]}."""
    outputs = [reference.forward(params, CONFIG, batch) for batch in batches]

    def sequences(values):
        kept = (x[batch["segment_ids"] > 0] for x, batch in zip(values, batches))
        counts = [np.sum(batch["segment_ids"] > 0, axis=1) for batch in batches]
        rows = [part for x, c in zip(kept, counts) for part in np.split(x, np.cumsum(c)[:-1])]
        return [row for row in rows if len(row)]

    names = outputs[0]["layers"][0]
    result = {n: [sequences([o["layers"][i][n] for o in outputs]) for i in range(CONFIG.layers)] for n in names}
    result["final_norm_in"] = [sequences([o["final_norm_in"] for o in outputs])]
    result["final_norm_out"] = [sequences([o["hidden"] for o in outputs])]
    result["heads"] = [[np.linalg.norm(x, axis=-1) for x in layer] for layer in result["heads"]]
    return result


def aggregate(sequences, batch, sequence):
    inner = {"mean": lambda a: a.mean(0), "l2": lambda a: np.sqrt((a**2).sum(0)), "var": lambda a: a.var(0)}
    s = np.stack([inner[sequence](np.abs(x)) for x in sequences])
    return inner[batch](s)


@pytest.mark.parametrize("batch", ["mean", "l2", "var"])
@pytest.mark.parametrize("sequence", ["mean", "l2", "var"])
def test_width_scores(measured, raw, batch, sequence):
    scores = measured.scores(batch, sequence)

    def over_layers(name):
        return np.stack([aggregate(layer, batch, sequence) for layer in raw[name]])

    # a variance is a difference of sums of its own size squared, so it keeps fewer digits
    tolerance = 1e-3 if "var" in (batch, sequence) else TOLERANCE
    assert reference.relative(scores.neurons_LF, over_layers("neurons")) < tolerance
    assert reference.relative(scores.heads_LH, over_layers("heads")) < tolerance
    norms = ("attention_norm_out", "mlp_norm_out", "final_norm_out")
    channels_D = sum(over_layers(name).sum(0) for name in norms)
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
        h_in, h_out = np.concatenate(raw["in"][i]), np.concatenate(raw["out"][i])
        cosine = (h_in * h_out).sum(-1) / np.linalg.norm(h_in, axis=-1) / np.linalg.norm(h_out, axis=-1)
        assert abs(scores.layers_L[i] - np.mean(1 - cosine)) < 1e-5
    for field, name in (("attention_norm_LD", "attention_norm_in"), ("mlp_norm_LD", "mlp_norm_in")):
        for i in range(CONFIG.layers):
            assert reference.relative(getattr(scores, field)[i], energy_share(raw[name][i])) < TOLERANCE
    assert reference.relative(scores.final_norm_D, energy_share(raw["final_norm_in"][0])) < TOLERANCE


def energy_share(sequences):
    square = np.square(np.concatenate(sequences))
    return np.mean(square / square.sum(-1, keepdims=True), axis=0)


def test_groups_and_weight_aware(measured, params):
    plain, aware = measured.scores(), measured.scores(weight_aware=True)
    flat = models.flatten(reference.float64(params))
    row_LF = np.linalg.norm(flat["layers/mlp/down"], axis=-1)
    assert reference.relative(aware.neurons_LF, plain.neurons_LF * row_LF) < TOLERANCE
    out_LH = np.linalg.norm(flat["layers/attention/out"], axis=(-1, -2))
    for k in range(CONFIG.kv_heads):
        heads = slice(3 * k, 3 * k + 3)
        expected = np.sqrt(((plain.heads_LH * out_LH)[:, heads] ** 2).sum(-1))
        assert reference.relative(plain.groups_LK[:, k], expected) < TOLERANCE


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
    after = importance.collect(models.unflatten(flat), CONFIG, batches)
    orders = {"F": neurons, "H": heads, "K": groups, "D": channels}
    for field in dataclasses.fields(before):
        value = getattr(before, field.name)
        if isinstance(value, np.ndarray):
            expected = value[..., orders[field.name[-1]]] if field.name[-1] in orders else value
            assert reference.relative(getattr(after, field.name), expected) < TOLERANCE, field.name


def test_batch_borders_do_not_matter(params, batches, measured):
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    mixed = [{name: x[rows] for name, x in joined.items()} for rows in ([5, 0, 4], [2, 1, 3])]
    again = importance.collect(params, CONFIG, mixed)
    assert reference.relative(again.neurons_LF, measured.scores().neurons_LF) < TOLERANCE
    assert reference.relative(again.layers_L, measured.scores().layers_L) < TOLERANCE
    assert reference.relative(again.final_norm_D, measured.scores().final_norm_D) < TOLERANCE


def test_save_and_load(measured, tmp_path):
    scores = measured.scores("var", "l2", True)
    scores.save(tmp_path / "deep" / "scores.npz")
    back = importance.Scores.load(tmp_path / "deep" / "scores.npz")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scores.npz"]
    for field in dataclasses.fields(scores):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(scores, field.name))
    (tmp_path / "other.npz").write_text("no")
    for name in ("other.npz", "absent.npz"):
        with pytest.raises(UserError, match=name):
            importance.Scores.load(tmp_path / name)


def test_errors(params, batches, measured):
    with pytest.raises(UserError, match="batches: no tokens"):
        importance.collect(params, CONFIG, [])
    with pytest.raises(UserError, match="'segment_ids'"):
        importance.collect(params, CONFIG, [{"inputs": 1, "positions": 1}])
    with pytest.raises(UserError, match=r"prune\.sequence_aggregation"):
        measured.scores("l2", "median")
    with pytest.raises(UserError, match=r"model\.experts"):
        importance.collect(params, testing.moe_config(), batches)
