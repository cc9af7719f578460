"""What pruning measured and what it kept: layers, heads and neurons on shared rows, channels below."""

import itertools
from typing import Any

import numpy as np

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report import raster
from kwaicoder_jax.evaluation.report.markup import Html, element, figure, join, key
from kwaicoder_jax.evaluation.report.material import Material
from kwaicoder_jax.evaluation.report.svg import Plot, Scale, drawing, line, padded, rectangle, text

INFLUENCE, HEADS, NEURONS = (78, 210), (300, 150), (490, 460)  # left edge and width of each column of the figure
BINS = 240


def maps(material: Material) -> Html:
    """The figures, when the scores and the record of what was kept are there."""
    scores, record = material.scores, material.step("prune")
    if "neurons_LF" not in scores or "kept" not in record:
        return Html("")
    before, after = record["config_before"], record["config_after"]
    tokens = (part := material.part("prune")) and part.summary.get("calibration_tokens")
    names = (
        ("layers", "layers"), ("model channels", "model_dim"), ("MLP neurons a layer", "mlp_dim"),
        ("query heads", "heads"), ("key-value heads", "kv_heads"),
    )  # fmt: skip
    cuts = [
        f"{name} {q.whole(before[field])} → {q.whole(after[field])}"
        for name, field in names
        if before[field] != after[field]
    ]
    caption = (
        "Layers: block influence, 1 − cos(input, output), mean over tokens. Heads and neurons: the square root of the "
        "activation score relative to the layer's largest, so that small scores can be told apart. The lines "
        "underneath say what was kept."
    )
    seen = f" Scored on {q.whole(tokens)} tokens." if tokens else ""
    legend = join([key("kept", "kept"), key("dropped", "removed")])
    return join(
        [
            element("p", f"Cut: {', '.join(cuts) or 'nothing'}.{seen}"),
            figure("Importance of layers, heads and neurons", _rows(scores, record["kept"]), caption, legend),
            figure(
                "Importance of model channels", _channels(scores["channels_D"], record["kept"]["embed"]),
                "Summed over all norms and layers, relative to the largest; in the order of their score.", legend,
            ),
        ]
    )  # fmt: skip


def _rows(scores: Any, kept: dict[str, Any]) -> Html:
    layers = scores["layers_L"]
    pitch = 30 if len(layers) <= 16 else 18
    parts = [
        text(left, 18, name, "label")
        for left, name in (
            (INFLUENCE[0], "block influence"),
            (HEADS[0], f"{scores['heads_LH'].shape[1]} heads"),
            (NEURONS[0], f"{q.whole(scores['neurons_LF'].shape[1])} MLP neurons, most important first"),
        )
    ]
    length = Scale(0, max(float(np.max(layers)), 1e-9), 0, INFLUENCE[1] - 50)
    for layer, influence in enumerate(layers):
        top = 30 + layer * pitch
        place = kept["layers"].index(layer) if layer in kept["layers"] else None
        state = "dropped" if place is None else "kept"
        parts.append(text(INFLUENCE[0] - 10, top + 14, f"layer {layer}", "tick", "end"))
        parts.append(rectangle(INFLUENCE[0], top + 2, max(length(influence), 0.5), 15, f"fill {state}"))
        parts.append(text(INFLUENCE[0] + length(influence) + 6, top + 14, f"{influence:.3f}", "tick"))
        cells = [*_heads(scores["heads_LH"][layer], None if place is None else kept["heads"][place], top)]
        cells += _neurons(scores["neurons_LF"][layer], None if place is None else kept["mlp"][place], top)
        parts.append(element("g", *cells, class_="" if place is not None else "removed"))
    return drawing(960, 34 + pitch * len(layers), parts, "importance by layer, head and neuron")


def _relative(scores: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(scores, float), 0) / max(float(np.max(scores)), 1e-30)


def _heads(scores_H: np.ndarray, kept: list[int] | None, top: float) -> list[Html]:
    """A cell a head, its opacity the score."""
    width = HEADS[1] / len(scores_H)
    gap = min(3.0, width / 4)
    cells = [
        rectangle(HEADS[0] + head * width, top + 2, width - gap, 13, "heat", f"head {head}: {score:.3g}",
                  fill_opacity=f"{share:.2f}")
        for head, (score, share) in enumerate(zip(scores_H, np.sqrt(_relative(scores_H))))
    ]  # fmt: skip
    return cells + _underlined(np.isin(np.arange(len(scores_H)), kept or []), HEADS, top, gap)


def _neurons(scores_F: np.ndarray, kept: list[int] | None, top: float) -> list[Html]:
    order = np.argsort(-scores_F, kind="stable")
    shares = raster.binned(np.sqrt(_relative(scores_F))[order], BINS)
    strip = raster.image(raster.sequential(shares[None]), NEURONS[0], top + 2, NEURONS[1], 13)
    return [strip, *_underlined(np.isin(order, kept or []), NEURONS, top, 0)]


def _underlined(kept: np.ndarray, column: tuple[int, int], top: float, gap: float) -> list[Html]:
    """A line under the units of a row: one colour under what was kept, another under the rest."""
    width, y = column[1] / len(kept), top + 17.5
    return [
        line(column[0] + start * width, y, column[0] + end * width - gap, y, f"rule {'kept' if on else 'dropped'}")
        for start, end, on in _stretches(kept)
    ]


def _stretches(flags: np.ndarray) -> list[tuple[int, int, bool]]:
    """(start, end, value) of each run of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(flags)) + 1).tolist(), len(flags)]
    return [(a, b, bool(flags[a])) for a, b in itertools.pairwise(borders)]


def _channels(scores_D: np.ndarray, kept: list[int]) -> Html:
    order = np.argsort(-scores_D, kind="stable")
    heights = raster.binned(_relative(scores_D)[order], BINS)
    marked = raster.binned(np.isin(order, kept).astype(float), BINS)
    plot = Plot(960, 190, (0, len(scores_D)), (0, padded([0, 1])[1]), margin=(58, 10, 10, 42))
    plot.axes("model channels, most important first", "relative score")
    width = (plot.right - plot.left) / len(heights)
    for i, (height, share) in enumerate(zip(heights, marked)):
        state = "fill kept" if share >= 0.5 else "fill dropped"
        x, y = plot.left + i * width, plot.up(float(height))
        plot.over(rectangle(x, y, width * 0.8, plot.bottom - y, state))
    return plot.render("importance of model channels")
