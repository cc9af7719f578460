"""The curves of pruning and the comparison in transformers, as the page shows them."""

import dataclasses

import pytest

from kwaicoder_jax.evaluation.report import curve, exported
from kwaicoder_jax.evaluation.report.material import Material

ROWS = [
    {"field": "layers", "size": 30, "rule": "importance", "params": 1000, "loss": 2.0},
    {"field": "layers", "size": 20, "rule": "importance", "params": 700, "loss": 2.5},
    {"field": "layers", "size": 10, "rule": "importance", "params": 400, "loss": 30.0},
    {"field": "layers", "size": 20, "rule": "deepest", "params": 700, "loss": 3.25},
    {"field": "mlp_dim", "size": 64, "rule": "importance", "params": 800, "loss": 2.125},
]
ALONE = {"loss": 2.0, "increase_L": [3.0, 0.01, -0.001, 0.5], "tokens": 1234}


def test_every_row_is_in_the_table():
    text = curve.as_table(ROWS)
    for words in ("depth", "deepest", "MLP neurons", "2.5000", "+0.5000", "+28.0000", "+0.1250", "700"):
        assert words in text


def test_the_plot_has_a_curve_for_each_size_and_rule_from_the_whole_model():
    drawing = curve.plot(ROWS)
    assert drawing.count("<polyline") == 3
    first = [each.split(" ")[0] for each in drawing.split('points="')[1:]]
    assert len(set(first)) == 1  # all begin at the whole model
    assert drawing.count("<circle") == 6  # of 3 wholes and 4 points one lies beyond the frame
    assert "depth, deepest 20: 700, loss 3.2500" in drawing


def test_a_bar_for_each_layer():
    drawing = curve.layers(ALONE)
    assert drawing.count("<rect") == 4
    assert "layer 2: -0.0010 nats" in drawing
    assert "1,234 tokens" in curve.section(ROWS, ALONE).replace("\u202f", ",").replace("\u00a0", ",")


def test_nothing_from_nothing():
    assert curve.section([], {}) == exported.comparison(Material("t", "", [])) == ""


@pytest.mark.parametrize("same", [True, False])
def test_texts_of_both(same):
    text = {"prompt": "a <b>", "transformers": "one & two", "ours": "one & two" if same else "other"}
    found = {"max_logit_difference": 3e-5, "texts": [text], "transformers_version": "5.1"}
    shown = exported.comparison(dataclasses.replace(Material("t", "", []), comparison=found))
    assert "a &lt;b&gt;<mark" in shown
    assert "one &amp; two</mark>" in shown
    assert ("other</mark>" in shown) is not same
    assert f"{int(same)} of 1 greedy texts" in shown
