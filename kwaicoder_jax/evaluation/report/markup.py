"""HTML from plain data. Everything that enters as text is escaped here: what a model wrote is hostile text."""

import html
import unicodedata
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already; any other str is escaped where it enters."""

    __slots__ = ()


def escape(text: object) -> Html:
    """`text` as characters on the page; Html passes. Control, format and lone surrogate characters are made visible."""
    if isinstance(text, Html):
        return text
    shown = "".join(letter if _harmless(letter) else _named(letter) for letter in str(text))
    return Html(html.escape(shown, quote=True))


def _harmless(letter: str) -> bool:
    # Cf has the marks that turn the direction of what follows, Cs cannot be encoded, Cc confuses terminals.
    return letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs")


def _named(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def element(name: str, *children: object, **attributes: object) -> Html:
    """<name attributes>children</name>; `class_` stands for class, other underscores for hyphens."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items() if value != ""
    )
    return Html(f"<{name}{shown}>{join(children)}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts one after the other, escaped where they are text."""
    return Html(between.join(escape(part) for part in parts))


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], *, text_columns: int = 1, css: str = "") -> Html:
    """A table; the first `text_columns` columns are text, the others numbers (aligned right). Scrolls when too wide."""

    def cells(name: str, row: Sequence[object]) -> Html:
        return join(
            element(name, value, class_="" if place < text_columns else "number") for place, value in enumerate(row)
        )

    body = join(element("tr", cells("td", row)) for row in rows)
    whole = element("table", element("thead", element("tr", cells("th", heads))), element("tbody", body), class_=css)
    return element("div", whole, class_="scroll")


def figure(title: object, drawing: object, caption: object = "", legend: object = "") -> Html:
    """A chart with what it shows above it and what has to be known to read it below."""
    return element(
        "figure",
        element("h3", title),
        legend and element("div", legend, class_="legend"),
        drawing,
        caption and element("figcaption", caption),
    )


def key(css: str, label: object) -> Html:
    """One entry of a legend."""
    return element("span", element("i", class_=f"key {css}"), label)


def section(anchor: str, title: str, *content: object) -> Html:
    """A part of the page; nothing when it has no content."""
    if not any(content):
        return Html("")
    return element("section", element("h2", title), *content, id=anchor)
