"""The loss of every stage on one axis of tokens, as a whole and by source."""

import itertools
import math

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report import runs
from kwaicoder_jax.evaluation.report.markup import Html, element, figure, join, key
from kwaicoder_jax.evaluation.report.material import Material
from kwaicoder_jax.evaluation.report.svg import Plot, Point, counts, padded, text

LETTER = 8.0  # width of a letter of a chart's text, in its pixels: bold, at the larger size of a narrow window


def charts(material: Material) -> Html:
    """The chart of all stages, a closer look at what follows the first, and one small chart a source."""
    segments, baseline = runs.segments(material)
    if not segments:
        return Html("")
    legend = join(
        [
            key("mark", "validation loss"),
            key("faint", "training loss"),
            key("dashed", "validation loss without the teacher") if baseline else "",
        ]
    )
    note = "Validation: fixed documents, cross-entropy without fill-in-the-middle."
    if any(segment.train for segment in segments):
        note += " Training: the stage's own batches, fill-in-the-middle included."
    if any("loss" in part.section for part in material.stages):
        note += " Distillation trains on the divergence from the teacher, which is another quantity and not drawn."
    parts = [figure("Loss of every stage", _chart(material, segments, baseline), note, legend)]
    if len(segments) > 1 and len(segments[0].valid) > 2:
        close = _closer(segments), baseline
        parts.append(figure(f"The same from the end of {segments[0].name} on", _chart(material, *close), "", legend))
    parts.append(_by_source(segments, baseline))
    return join(parts)


def _closer(segments: list[runs.Segment]) -> list[runs.Segment]:
    """The last quarter of the first stage, and the others whole."""
    first = segments[0]
    return [first.since(first.end - 0.25 * (first.end - first.start)), *segments[1:]]


def _chart(material: Material, segments: list[runs.Segment], baseline: runs.Segment | None) -> Html:
    every = [p for s in [*segments, *([baseline] if baseline else [])] for p in s.valid]
    low = min((p[0] for s in segments for p in [*s.valid, *s.train]), default=0.0)
    bottom, top = padded([y for _, y in every] + _within([y for s in segments for _, y in s.train]))
    top += 0.1 * (top - bottom)  # room for the names of the events
    plot = Plot(960, 400, (low, max(segments[-1].end, low + 1)), (bottom, top), margin=(58, 50, 20, 42))
    plot.axes("tokens trained on, all stages together", "loss (nats per token)", counts)
    for place, segment in enumerate(segments):
        _headings(plot, segment, last=place == len(segments) - 1)
        plot.line(segment.train, f"{segment.css} faint")
    for before, after in itertools.pairwise(segments):
        if before.valid and after.valid:
            plot.line([before.valid[-1], after.valid[0]], "jump")
    for segment in segments:
        plot.line(segment.valid, f"{segment.css} strong")
        plot.marks(segment.valid, segment.css, lambda x, y: f"{q.count(x)} tokens: {q.loss(y)} nats per token")
    if baseline:
        plot.line(baseline.valid, f"{baseline.css} strong dashed")
        plot.marks(
            baseline.valid[1:], f"{baseline.css} hollow", lambda x, y: f"{q.count(x)} tokens, no teacher: {q.loss(y)}"
        )
    plot.over(*_events(plot, material, segments))
    return plot.render("validation and training loss against tokens")


def _within(train: list[float]) -> list[float]:
    """What the frame must hold of the training losses: all but the highest hundredth, which a spike may be."""
    finite = sorted(filter(math.isfinite, train))
    return finite[: max(1, math.ceil(0.99 * len(finite)))]


def _headings(plot: Plot, segment: runs.Segment, last: bool) -> None:
    """Above the frame: the stage with its losses, and its phases; whatever does not fit is left out."""
    left, right = max(plot.across(segment.start), plot.left), plot.across(segment.end)
    if not last:
        plot.vertical(segment.end, "border")
    middle, room = (left + right) / 2, right - left
    losses = f"{segment.name} {q.loss(segment.valid[0][1])} → {q.loss(segment.valid[-1][1])}" if segment.valid else ""
    whole = plot.x[0] <= segment.start
    for name in (losses if whole else "", segment.name):
        if name and len(name) * LETTER <= room:
            plot.over(text(middle, 16, name, f"label {segment.css}", "middle"))
            break
    ends = [start for start, _ in segment.phases[1:]] + [segment.end]
    for (start, name), end in zip(segment.phases, ends):
        if start > segment.start:
            plot.vertical(start, "phase")
        if len(name) * LETTER <= plot.across(end) - plot.across(start):
            plot.over(text((plot.across(start) + plot.across(end)) / 2, 36, name, "tick", "middle"))


def _events(plot: Plot, material: Material, segments: list[runs.Segment]) -> list[Html]:
    """The transforms between training runs, with what each did to the validation loss, beside the border."""
    order = [part.name for part in material.stages]
    found: list[Html] = []
    for stage, before, after in (
        ("prune", "valid_loss_before", "valid_loss_after"),
        ("upcycle", "valid_loss_dense", "valid_loss_moe"),
    ):
        part = material.part(stage)
        if part is None or before not in part.summary:
            continue
        earlier = [s for s in segments if order.index(s.name) < order.index(stage)]
        x = plot.across(earlier[-1].end) if earlier else plot.left
        name = f"{stage} {q.change(part.summary[after] - part.summary[before])}"
        right = x + 6 + len(name) * LETTER < plot.right  # otherwise on the left of the border
        place = (x + 6, "start") if right else (x - 6, "end")
        found.append(text(place[0], plot.top + 16 + 18 * len(found), name, "label event", place[1]))
    return found


def _by_source(segments: list[runs.Segment], baseline: runs.Segment | None) -> Html:
    names = sorted({name for segment in segments for name in segment.sources})
    every = [p[1] for s in segments for points in s.sources.values() for p in points]
    if not names:
        return Html("")
    y, x = padded(every), (segments[0].start, segments[-1].end)
    cells = [_source(name, segments, baseline, x, y) for name in names]
    grid = element("div", *cells, class_="grid")
    return figure("Validation loss by source", grid, "Nats per token against tokens trained on; all on one scale.")


def _source(name: str, segments: list[runs.Segment], baseline: runs.Segment | None, x: Point, y: Point) -> Html:
    plot = Plot(240, 190, x, y, margin=(40, 8, 14, 22))
    plot.axes("", "", counts)
    points = [segment.sources.get(name, []) for segment in segments]
    for before, after in itertools.pairwise(points):
        if before and after:
            plot.line([before[-1], after[0]], "jump")
    for segment, each in zip(segments, points):
        plot.line(each, f"{segment.css} strong")
        plot.marks(each[:1] + each[-1:], segment.css, lambda x, y: f"{q.count(x)} tokens: {q.loss(y)} nats per token")
    if baseline:
        plot.line(baseline.sources.get(name, []), f"{baseline.css} strong dashed")
    last = next((each[-1] for each in reversed(points) if each), None)
    end = f" {q.loss(last[1])} at the end" if last else ""
    title = element("h4", name, element("span", end))
    return element("div", title, plot.render(f"validation loss of {name}"))
