"""What pruning costs before any training: held-out loss by parameters, one curve a size; and without each layer.

Rows are plain dicts, as curve.jsonl holds them: "field", "size", "rule", "params", "loss".
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, figure, join, key, table
from kwaicoder_jax.evaluation.report.svg import Plot, counts, padded, rectangle, text

Row = Mapping[str, Any]
_ROOM = 5.0  # nats above the whole model that the chart shows; what is lost beyond that is lost
_NAMES = {"layers": "depth", "model_dim": "model channels", "mlp_dim": "MLP neurons", "heads": "query heads",
          "kv_heads": "key-value heads"}  # fmt: skip


def section(rows: Sequence[Row], alone: Mapping[str, Any]) -> Html:
    """The charts and the table; nothing without rows."""
    if not rows:
        return Html("")
    caption = (
        "Held-out loss right after cutting one size, without any training. Deepest and shallowest take layers by their "
        "place alone, the ends excepted."
    )
    parts = [figure("Loss by parameters kept", plot(rows), caption, _legend(rows))]
    if alone:
        words = f"Increase of the loss of {alone['loss']:.4f} nats, on {q.whole(alone['tokens'])} tokens."
        parts.append(figure("Loss without one layer", layers(alone), words))
    return join([*parts, as_table(rows)])


def as_table(rows: Sequence[Row]) -> Html:
    """All points in the order in which they were asked for."""
    whole = rows[0]["loss"]
    cells = [
        [_NAMES.get(row["field"], row["field"]), row["rule"], row["size"], q.count(row["params"]),
         f"{row['loss']:.4f}", f"{row['loss'] - whole:+.4f}"]
        for row in rows
    ]  # fmt: skip
    return table(["cut", "by", "size", "parameters", "loss", "against the whole model"], cells, text_columns=2)


def _curves(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """By size and rule, each beginning at the whole model."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows[1:]:
        found.setdefault((row["field"], row["rule"]), [rows[0]]).append(row)
    return {name: sorted(each, key=lambda row: -row["params"]) for name, each in found.items()}


def _name(field: str, rule: str) -> str:
    return _NAMES.get(field, field) + ("" if rule == "importance" else f", {rule}")


def _css(place: int) -> str:
    return f"s{place % 4}" + (" dashed" if place >= 4 else "")


def _legend(rows: Sequence[Row]) -> Html:
    return join([key(_css(place), _name(*each)) for place, each in enumerate(_curves(rows))], " ")


def plot(rows: Sequence[Row]) -> Html:
    """Loss against parameters, cut off where a model is ruined."""
    top = min(max(row["loss"] for row in rows if math.isfinite(row["loss"])), rows[0]["loss"] + _ROOM)
    inside = [row["loss"] for row in rows if row["loss"] <= top]
    drawing = Plot(960, 420, padded([row["params"] for row in rows]), padded(inside), margin=(58, 14, 16, 44))
    drawing.axes("parameters", "held-out loss (nats per token)", counts)
    for place, curve in enumerate(_curves(rows).values()):
        css = _css(place)
        drawing.line([(row["params"], row["loss"]) for row in curve], css)
        for row in curve:
            drawing.marks([(row["params"], row["loss"])], css.split()[0], functools.partial(_tip, row))
        last = [row for row in curve if row["loss"] <= drawing.y[1]][-1]
        gap, anchor = (-8, "end") if last["params"] > sum(drawing.x) / 2 else (8, "start")
        x, y = drawing.across(last["params"]) + gap, drawing.up(last["loss"]) - 6
        drawing.over(text(x, y, _name(curve[1]["field"], curve[1]["rule"]), css.split()[0], anchor))
    return drawing.render("held-out loss of pruned models against their parameters")


def _tip(row: Row, x: float, y: float) -> str:
    return f"{_name(row['field'], row['rule'])} {row['size']}: {q.count(x)}, loss {y:.4f}"


def _powers(places: Sequence[float]) -> list[str]:
    return [f"{10.0**place:g}" for place in places]


def layers(alone: Mapping[str, Any]) -> Html:
    """A bar a layer, on a logarithmic scale: the first layers cost a thousand times what others do."""
    costs = [max(cost, 1e-4) for cost in alone["increase_L"]]
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)) + 1e-9)
    high = max(high, low + 1)
    drawing = Plot(960, 220, (-0.5, len(costs) - 0.5), (low, high), margin=(58, 10, 16, 42))
    drawing.axes("layer left out", "increase (nats)", most_y=high - low + 1, name_y=_powers)
    width = (drawing.right - drawing.left) / len(costs)
    for layer, cost in enumerate(costs):
        x, y = drawing.left + layer * width, drawing.up(math.log10(cost))
        tip = f"layer {layer}: {alone['increase_L'][layer]:+.4f} nats"
        drawing.over(rectangle(x + width * 0.12, y, width * 0.76, drawing.bottom - y, "fill kept", tip))
    return drawing.render("increase of the loss without each layer")
