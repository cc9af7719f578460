"""One self-contained page over all stages: no script, no request to anywhere."""

from kwaicoder_jax.evaluation.report import (
    curve,
    experts,
    exported,
    importance,
    ledger,
    losses,
    mixture,
    overview,
    samples,
)
from kwaicoder_jax.evaluation.report.markup import Html, element, escape, join, section
from kwaicoder_jax.evaluation.report.material import Material
from kwaicoder_jax.evaluation.report.style import STYLE

# What a browser may load for this page: nothing. A second wall behind the escaping of what the model wrote.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def build(material: Material) -> str:
    """The page as text; equal material gives equal text. Parts without material are left out."""
    parts = (
        ("losses", "Loss", losses.charts(material)),
        ("curves", "What a cut costs", curve.section(material.curve, material.leave_one_out)),
        ("pruning", "Pruning", importance.maps(material)),
        ("upcycling", "Upcycling", mixture.upcycling(material)),
        ("experts", "Experts in training", experts.load(material)),
        ("exported", "In transformers", exported.comparison(material)),
        ("samples", "Samples", join([samples.functions(material), samples.infillings(material)])),
        ("evaluation", "Evaluation", ledger.evaluation(material)),
        ("ledger", "Cost of each stage", ledger.stages(material) if material.stages else ""),
        ("data", "Data", ledger.data(material)),
        ("origin", "How this was made", _origin(material)),
    )
    links = [element("a", title, href=f"#{anchor}") for anchor, title, content in parts if content]
    header = element(
        "header", element("h1", material.title), overview.headline(material), overview.flow(material),
        element("nav", join(links, " ")),
    )  # fmt: skip
    body = element("main", header, *[section(anchor, title, content) for anchor, title, content in parts])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{element('title', material.title)}<style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _origin(material: Material) -> Html:
    if not material.stages:
        return Html("")
    command = element("pre", element("code", material.command), class_="command") if material.command else ""
    return join([command, ledger.lineage(material), ledger.config(material)])
