"""How evenly the experts were used while the mixture was trained."""

import math
from typing import Any

import numpy as np

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report import raster, runs
from kwaicoder_jax.evaluation.report.markup import Html, element, figure, join, key
from kwaicoder_jax.evaluation.report.material import Material, Part
from kwaicoder_jax.evaluation.report.svg import Plot, counts, padded

CELLS = 3000  # most columns of all heat maps together, which bounds the page's size

CURVES = (
    ("expert_load_max_over_mean", "Largest load over mean load", "ratio, mean over layers; even load is 1", 1.0),
    ("router_entropy", "Entropy of the router", "nats, mean over layers and tokens; dashed: all experts equal", None),
    ("load_balance_loss", "Load-balance loss", "before its weight; even load is 1", 1.0),
    ("router_z_loss", "Router z-loss", "before its weight; squared log-sum-exp of the router's logits", None),
)


def load(material: Material) -> Html:
    """Heat maps by layer and curves, of the last stage that trained a mixture."""
    for part in reversed(material.stages):
        records = [r for r in part.metrics if "expert_load" in r]
        if len(records) > 1:
            return join([_maps(part, records), _curves(part, records)])
    return Html("")


def _maps(part: Part, records: list[dict[str, Any]]) -> Html:
    load_TLE = np.array([r["expert_load"] for r in records], float)
    tokens = np.array([r["tokens"] for r in records], float)
    ratio_TLE = load_TLE * load_TLE.shape[2]
    layers = ratio_TLE.shape[1]
    columns = int(np.clip(CELLS / layers, 40, 160))
    cells = [_map(layer, ratio_TLE[:, layer], tokens, part, columns) for layer in range(layers)]
    legend = join(
        [
            key("ramp", f"0 — 1 (even: {q.percent(1 / load_TLE.shape[2])} of a layer's tokens) — 2 and more"),
        ]
    )
    caption = (
        "Share of each expert, as a multiple of the even share, at the logged steps. Rows: experts by number. Across: tokens "
        "trained on in this stage; thin lines: borders of phases."
    )
    grid = element("div", *cells, class_="grid")
    return figure(f"Load of the experts during {part.name}, by layer", grid, caption, legend)


def _map(layer: int, ratio_TE: np.ndarray, tokens: np.ndarray, part: Part, columns: int) -> Html:
    # Logged steps are not evenly spaced in tokens; each column shows the logged step nearest to it.
    count = int(np.clip(2 * len(tokens), 40, columns))
    places = np.linspace(tokens[0], tokens[-1], count)
    nearest = np.abs(places[:, None] - tokens[None]).argmin(1)
    experts = ratio_TE.shape[1]
    plot = Plot(240, 150, (float(tokens[0]), float(tokens[-1])), (experts - 0.5, -0.5), margin=(28, 8, 14, 22))
    plot.over(
        raster.image(raster.diverging(ratio_TE[nearest].T), plot.left, plot.top, plot.right - plot.left,
                     plot.bottom - plot.top)
    )  # fmt: skip
    plot.axes("", "", counts, most_y=8)
    for start, _ in runs.phases(part)[1:]:
        plot.vertical(start, "phase", front=True)
    last = ratio_TE[-1]
    end = f" {last.min():.2f} to {last.max():.2f} at the end"
    title = element("h4", f"layer {layer}", element("span", end))
    return element("div", title, plot.render(f"load of the experts of layer {layer}"))


def _curves(part: Part, records: list[dict[str, Any]]) -> Html:
    experts = len(records[0]["expert_load"][0])
    cells = []
    for name, title, unit, even in CURVES:
        points = [(float(r["tokens"]), float(r[name])) for r in records if name in r]
        if not points:
            continue
        level = math.log(experts) if name == "router_entropy" else even
        values = [y for _, y in points] + ([] if level is None else [level])
        plot = Plot(240, 160, (points[0][0], points[-1][0]), padded(values, 0.1), margin=(46, 6, 14, 22))
        plot.axes("", "", counts)
        if level is not None:
            plot.horizontal(level, "reference")
        for start, _ in runs.phases(part)[1:]:
            plot.vertical(start, "phase")
        plot.line(points, "s2 strong")
        shown = element("h4", title, element("span", f" {points[-1][1]:.3f} at the end"))
        cells.append(element("div", shown, plot.render(title), element("small", unit)))
    return figure(f"Routing during {part.name}", element("div", *cells, class_="grid"),
                  "Against tokens trained on in this stage; thin lines: borders of phases.")  # fmt: skip
