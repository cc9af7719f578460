"""Charts as inline SVG: scales, ticks and a frame. Colours are CSS classes, so that the page's theme applies."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from kwaicoder_jax.evaluation.report.markup import Html, element, escape, join

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps [low, high] of the data to [start, end] of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers inside [low, high], at most `most` of them."""
    if not high > low or most < 1:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        if step == 2.5:  # between whole numbers; 25 and 0.25 are fine
            continue
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            return [number * step for number in range(first, last + 1)]
    return [low]


def plain(places: Sequence[float]) -> list[str]:
    """Ticks with just the decimals that tell them apart."""
    gap = min((b - a for a, b in itertools.pairwise(places)), default=1.0)
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 0
    decimals += any(abs(round(p, decimals) - p) > gap / 100 for p in places)
    return [f"{place:.{decimals}f}".replace("-", "−") for place in places]


def counts(places: Sequence[float]) -> list[str]:
    """Ticks in one unit, the largest one's: 0, 0.5 M, 1.0 M."""
    names = ("", "k", "M", "B", "T")
    largest = max((abs(place) for place in places), default=0.0)
    power = min(int(math.log10(largest) // 3), len(names) - 1) if largest >= 1000 else 0
    shown = plain([place / 1000**power for place in places])
    return ["0" if place == 0 else f"{name}\u00a0{names[power]}".strip() for place, name in zip(places, shown)]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """A range around the values, with room at both ends; finite values only."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = (high - low) * share or max(abs(high) * 0.05, 1e-6)
    return low - room, high + room


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0") if abs(value) >= 0.05 else "0"


def text(x: float, y: float, content: object, css: str = "", anchor: str = "start") -> Html:
    """A line of text; y is its base line."""
    return element(
        "text", content, x=number(x), y=number(y), class_=css, text_anchor="" if anchor == "start" else anchor
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Html:
    """A straight line."""
    return element("line", x1=number(x1), y1=number(y1), x2=number(x2), y2=number(y2), class_=css)


def rectangle(x: float, y: float, width: float, height: float, css: str, tip: str = "", **more: object) -> Html:
    """A filled rectangle; `tip` shows when the pointer rests on it."""
    shape = {"x": number(x), "y": number(y), "width": number(width), "height": number(height), "class_": css}
    return element("rect", element("title", tip) if tip else "", **shape, **more)


def drawing(width: float, height: float, parts: Iterable[object], label: str) -> Html:
    """The <svg>, as wide as its column; `label` is read aloud in its place."""
    box = f"0 0 {number(width)} {number(height)}"
    return Html(f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{join(parts)}</svg>')


@dataclasses.dataclass
class Plot:
    """A frame with two axes.

    Attributes:
      width: of the whole drawing, in its own pixels.
      height: the same.
      x: range of the data.
      y: range of the data.
      margin: left, top, right, bottom.
    """

    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    margin: tuple[float, float, float, float] = (52, 12, 14, 40)

    def __post_init__(self):
        left, top, right, bottom = self.margin
        self.left, self.right, self.top, self.bottom = left, self.width - right, top, self.height - bottom
        self.across = Scale(*self.x, self.left, self.right)
        self.up = Scale(*self.y, self.bottom, self.top)
        self._behind: list[Html] = []
        self._inside: list[Html] = []
        self._over: list[Html] = []

    def axes(
        self,
        x_title: str,
        y_title: str,
        name_x: Callable[[Sequence[float]], list[str]] = plain,
        most_y: int = 0,
        name_y: Callable[[Sequence[float]], list[str]] = plain,
    ) -> None:
        """Draws both axes with ticks, titles and grid lines; with `most_y` ticks at most upwards, and no grid."""
        low, high = sorted(self.y)  # a heat map counts its rows from the top
        places = ticks(low, high, most_y or max(2, int((self.bottom - self.top) / 40)))
        for place, name in zip(places, name_y(places)):
            y = self.up(place)
            self._behind += [] if most_y else [line(self.left, y, self.right, y, "mesh")]
            self._behind.append(text(self.left - 7, y + 4, name, "tick", "end"))
        places = ticks(*self.x, max(4, int((self.right - self.left) / 60)))
        for place, name in zip(places, name_x(places)):
            x = self.across(place)
            self._behind += [line(x, self.bottom, x, self.bottom + 4, "axis")]
            self._behind += [text(x, self.bottom + 17, name, "tick", "middle")]
        self._behind.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))
        if x_title:
            self._over.append(text((self.left + self.right) / 2, self.height - 5, x_title, "tick", "middle"))
        if y_title:
            turn = f"translate(12 {number((self.top + self.bottom) / 2)}) rotate(-90)"
            self._over.append(element("text", y_title, class_="tick", text_anchor="middle", transform=turn))

    def line(self, points: Iterable[Point], css: str) -> None:
        """A curve; it breaks where a value is not finite."""
        run: list[str] = []
        runs = [run]
        for x, y in points:
            if math.isfinite(y):
                run.append(f"{number(self.across(x))},{number(self.up(y))}")
            elif run:
                runs.append(run := [])
        self._inside += [element("polyline", points=" ".join(each), class_=f"curve {css}") for each in runs if each]

    def marks(self, points: Iterable[Point], css: str, tip: Callable[[float, float], str]) -> None:
        """A dot for each point that lies in the frame."""
        for x, y in points:
            if math.isfinite(y) and self.y[0] <= y <= self.y[1] and self.x[0] <= x <= self.x[1]:
                place = {"cx": number(self.across(x)), "cy": number(self.up(y)), "r": 3, "class_": f"dot {css}"}
                self._over.append(element("circle", element("title", tip(x, y)), **place))

    def vertical(self, x: float, css: str, *, front: bool = False) -> None:
        """A line from the bottom to the top."""
        place = self._over if front else self._behind
        place.append(line(self.across(x), self.top, self.across(x), self.bottom, css))

    def horizontal(self, y: float, css: str) -> None:
        """A line from the left to the right."""
        self._behind.append(line(self.left, self.up(y), self.right, self.up(y), css))

    def over(self, *parts: Html) -> None:
        """Adds parts in the drawing's own pixels, in front."""
        self._over += parts

    def render(self, label: str) -> Html:
        """The drawing; curves are cut at the frame."""
        frame = f'x="{number(self.left)}" y="{number(self.top)}" width="{number(self.right - self.left)}"'
        frame += f' height="{number(self.bottom - self.top)}"'
        view = (
            f"{number(self.left)} {number(self.top)} {number(self.right - self.left)} {number(self.bottom - self.top)}"
        )
        inside = Html(f'<svg {frame} viewBox="{view}">{join(self._inside)}</svg>')
        return drawing(self.width, self.height, [*self._behind, inside, *self._over], label)
