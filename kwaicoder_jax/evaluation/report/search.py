"""The search for a shape: its table, and KL against parameters with the front that no candidate beats.

Rows are plain dicts, as search.jsonl holds them: "sizes", "params", "active", "bytes", "latency", "kl", "loss",
"distilled_loss".
"""

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, escape, figure, join, key, table
from kwaicoder_jax.evaluation.report.style import STYLE
from kwaicoder_jax.evaluation.report.svg import Plot, counts, padded

Row = Mapping[str, Any]
_NUMBERS = ("params", "active", "bytes", "latency", "kept", "kl", "loss", "distilled_loss")


def as_csv(rows: Sequence[Row]) -> str:
    """All rows with a column for each size; empty where something was not measured."""
    sizes = list(rows[0]["sizes"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*sizes, *_NUMBERS])
    for row in rows:
        numbers = ["" if row[name] is None else row[name] for name in _NUMBERS]
        writer.writerow([*(row["sizes"][name] for name in sizes), *numbers])
    return text.getvalue()


def plot(rows: Sequence[Row], front: Sequence[Row], best: Row) -> Html:
    """KL to the teacher against parameters; a line through the front, a hollow dot on the chosen shape."""
    measured = [row for row in rows if row["kl"] is not None]
    xs, ys = [row["params"] for row in measured], [row["kl"] for row in measured]
    drawing = Plot(960, 380, padded(xs), padded(ys), margin=(62, 14, 16, 44))
    drawing.axes("parameters", "KL(teacher to candidate), nats a token", counts)
    drawing.line([(row["params"], row["kl"]) for row in front], "s1")
    for row in measured:
        css = "hollow" if row["sizes"] == best["sizes"] else "s0"
        drawing.marks([(row["params"], row["kl"])], css, functools.partial(_tip, row))
    return drawing.render("KL of the candidates against their parameters")


def _tip(row: Row, x: float, y: float) -> str:
    sizes = ", ".join(f"{name} {size}" for name, size in row["sizes"].items())
    return f"{sizes}: {q.count(x)}, KL {y:.4f}"


def standalone(drawing: Html) -> str:
    """A drawing as a file of its own: with its name space and the page's style."""
    head, rest = drawing.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{head}><style>{escape(STYLE)}</style>{rest}\n"


def page(rows: Sequence[Row], front: Sequence[Row], best: Row, shapes: int) -> str:
    """A self-contained page: the plot, and the table with the least KL first."""
    sizes = list(best["sizes"])
    optional = [name for name in ("active", "latency", "distilled_loss") if any(_told(row, name) for row in rows)]
    shown = ["params", "bytes", "kl", "loss", *optional]
    ordered = sorted(rows, key=lambda row: (row["kl"] is None, row["kl"]))
    on_front = [row["sizes"] for row in front]
    marks = [
        "chosen" if row["sizes"] == best["sizes"] else "front" if row["sizes"] in on_front else "" for row in ordered
    ]
    cells = [
        [mark, *(row["sizes"][name] for name in sizes), *(_shown(name, row[name]) for name in shown)]
        for mark, row in zip(marks, ordered)
    ]
    words = f"{len(rows)} of {q.whole(shapes)} shapes inside the budget were pruned in memory and compared."
    legend = join([key("s1", "no candidate is smaller and nearer"), " hollow: chosen"])
    body = join(
        [
            element("h1", "Search for a shape"), element("p", words),
            figure("Nearness to the teacher against size", plot(rows, front, best), "", legend),
            table(["", *sizes, *shown], cells),
        ]
    )  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Search for a shape</title><style>{STYLE}</style></head>\n<body>{element('main', body)}</body></html>\n"
    )


def _told(row: Row, name: str) -> bool:
    return row[name] is not None and (name != "active" or row["active"] != row["params"])


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return ""
    formats = {"params": q.count, "active": q.count, "bytes": q.storage, "latency": lambda s: f"{1e3 * s:.3g} ms"}
    return formats.get(name, lambda number: f"{number:.4f}")(value)
