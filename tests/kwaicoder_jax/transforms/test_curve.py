"""Curves: every point is the model that `prune.apply` makes, and the rules take the layers that they say."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Target, curve, importance, prune

CONFIG = testing.dense_config(layers=5)


@pytest.fixture(scope="module")
def teacher():
    params = testing.random_params(CONFIG, 0)
    return params, importance.collect(params, CONFIG, [testing.random_batch(CONFIG, 2, 12, 0)])


def total(params, config):
    """Tells models apart: a number that depends on every parameter."""
    return float(sum(np.abs(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(params))) + config.layers


def test_each_point_is_the_pruned_model(teacher):
    params, scores = teacher
    wanted = curve.points(CONFIG, {"layers": (3,), "mlp_dim": (8, CONFIG.mlp_dim)}, ("deepest", "shallowest"))
    assert [(p.field, p.size, str(p.rule)) for p in wanted] == [
        ("layers", 5, "importance"), ("layers", 3, "importance"), ("layers", 3, "deepest"), ("layers", 3, "shallowest"),
        ("mlp_dim", 8, "importance"),
    ]  # fmt: skip
    found = list(curve.measure(params, CONFIG, scores, wanted, total, norm_correction=False))
    assert found[0].loss == total(params, CONFIG)
    for point in (found[1], found[4]):
        student, config, record = prune.apply(
            params, CONFIG, scores, Target(**{point.field: point.size}), norm_correction=False
        )
        assert point.loss == total(student, config)
        assert point.params == record["params_after"]
    for point, kept in ((found[2], [0, 1, 4]), (found[3], [0, 3, 4])):
        invented = scores.replace(layers_L=np.isin(np.arange(5), kept).astype(float))
        student, config, record = prune.apply(params, CONFIG, invented, Target(layers=3), norm_correction=False)
        assert record["kept"]["layers"] == kept
        assert point.loss == total(student, config)


def test_points_are_json_able():
    point = curve.Point("layers", 3, curve.Rule.DEEPEST, 10, 1.5)
    assert point.to_dict() == {"field": "layers", "size": 3, "rule": "deepest", "params": 10, "loss": 1.5}
    assert curve.Point.from_dict(point.to_dict()) == point


def test_bad_sizes_and_rules():
    for sizes, rules, words in (
        ({"layers": (9,)}, (), r"^prune.curve.layers: 9 cannot be kept of 5; use 1 to 5"),
        ({"experts": (2,)}, (), r"^prune.curve.experts: the model has no experts"),
        ({"depth": (2,)}, (), r"^prune.curve.depth: no such size; the sizes are layers, model_dim"),
        ({"layers": (3,)}, ("middle",), r"^prune.curve.layer_rules: no rule 'middle'; use importance, deepest"),
    ):
        with pytest.raises(UserError, match=words):
            curve.points(CONFIG, sizes, rules)
