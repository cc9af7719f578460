"""What curation did to the documents of places: a page of its own.

Facts are those of `data.curate`, by stage: "read", "clean", "deduplicate", "decontaminate".
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kwaicoder_jax.data.engine.tally import totals
from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, figure, join, key, section, table
from kwaicoder_jax.evaluation.report.style import STYLE
from kwaicoder_jax.evaluation.report.svg import Plot, padded

_STAGES = {
    "read": "read", "clean": "cleaned", "score": "scored", "deduplicate": "without duplicates",
    "decontaminate": "without benchmarks", "filter": "with a score that is high enough",
}  # fmt: skip
_DRAWN = 4  # languages whose scores are drawn
_STEPS = 50  # of a curve of scores


def build(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The page."""
    body = join(
        [
            element("h1", "Curated documents"),
            section("flow", "What each stage left", _flow(stages)),
            section("sources", "By place and language", _groups(stages)),
            section("rules", "What rules dropped", _rules(stages)),
            section("done", "What was done to texts", _done(stages)),
            section("skipped", "What was not read", _skipped(stages)),
            section("scores", "Scores", _scores(stages)),
            section("duplicates", "Duplicates", _duplicates(stages)),
            section("benchmarks", "Benchmarks", _benchmarks(stages)),
            section("examples", "Examples", _examples(stages)),
        ]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Curated documents</title><style>{STYLE}</style></head>\n<body>{element('main', body)}</body></html>\n"
    )


def _left(name: str, facts: Mapping[str, Any]) -> list[int]:
    if "counts" in facts:
        return totals(facts["counts"]).get("", {}).get("out", [0, 0])
    return list(facts["dropped"]["kept"])


def _flow(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    rows, before = [], None
    for name, facts in stages.items():
        documents, size = _left(name, facts)
        share = "" if before is None or not before[1] else q.percent(size / before[1])
        rows.append([_STAGES[name], q.whole(documents), q.storage(size), share])
        before = (documents, size)
    return table(["stage", "documents", "text", "share of the text before"], rows)


def _groups(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    clean = stages.get("clean")
    if clean is None:
        return Html("")
    found = []
    for by, title in (("source", "place"), ("language", "language")):
        rows = [
            [name or "not known", *_sizes(kinds.get("in", [0, 0])), *_sizes(kinds.get("out", [0, 0])), _share(kinds)]
            for name, kinds in sorted(totals(clean["counts"], by=by).items(), key=lambda item: -item[1]["in"][1])
        ]
        found.append(
            table(
                [title, "documents", "text", "documents after cleaning", "text after cleaning", "share of text"], rows
            )
        )
    return join(found)


def _sizes(pair: Sequence[int]) -> list[str]:
    return [q.whole(pair[0]), q.storage(pair[1])]


def _share(kinds: Mapping[str, Sequence[int]]) -> str:
    return q.percent(kinds.get("out", [0, 0])[1] / kinds["in"][1]) if kinds["in"][1] else ""


def _rules(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    if "clean" not in stages:
        return Html("")
    kinds = totals(stages["clean"]["counts"]).get("", {})
    whole = kinds.get("in", [0, 0])[1]
    rows = []
    for kind, pair in sorted(kinds.items(), key=lambda item: -item[1][1]):
        if kind.startswith("rule "):
            alone = kinds.get(f"only {kind[5:]}", [0, 0])
            shares = [q.percent(each[1] / whole) if whole else "" for each in (pair, alone)]
            rows.append([kind[5:], *_sizes(pair), shares[0], *_sizes(alone), shares[1]])
    if not rows:
        return Html("")
    heads = ["rule", "documents", "text", "share", "documents, by it alone", "text, by it alone", "share, by it alone"]
    return table(heads, rows)


def _done(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    kinds = totals(stages.get("clean", {}).get("counts", {})).get("", {})
    rows = [[kind[5:], q.whole(pair[0])] for kind, pair in sorted(kinds.items()) if kind.startswith("done ")]
    return table(["what", "times"], rows) if rows else Html("")


def _skipped(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    by_place = totals(stages["read"]["counts"], by="source")
    reasons = sorted({kind for kinds in by_place.values() for kind in kinds if kind.startswith("skipped ")})
    rows = [[reason[8:], *[q.whole(kinds.get(reason, [0, 0])[0]) for kinds in by_place.values()]] for reason in reasons]
    return table(["reason", *by_place], rows) if rows else Html("")


def _scores(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    facts = stages.get("score")
    if facts is None:
        return Html("")
    parts: list[object] = []
    if "held_out" in facts:
        held = facts["held_out"]
        words = f"Trained on {held['texts'] - held['held_out']:.0f} labelled texts. Of {held['held_out']:.0f} others"
        words += (
            f" {q.percent(held['accuracy'])} are judged as labelled; calibration error {held['calibration_error']:.3f}"
        )
        words += f", area under the ROC curve {held['auc']:.3f}." if "auc" in held else "."
        parts.append(element("p", words))
    counts = {name: sum(bins.values()) for name, bins in facts["histograms"].items()}
    largest = sorted(counts, key=lambda name: -counts[name])[:_DRAWN]
    legend = join([key(f"s{place}", name or "not known") for place, name in enumerate(largest)], " ")
    parts.append(figure("Scores by language", _curves(facts["histograms"], largest), "", legend))
    lowest = stages.get("filter", {}).get("thresholds", {})
    rows = [[name or "not known", q.whole(counts[name]), f"{lowest.get(name, 0.0):.3f}"] for name in largest]
    parts.append(table(["language", "documents", "lowest score that stays"], rows))
    return join([*parts, *_kinds(facts["examples"])])


def _curves(histograms: Mapping[str, Mapping[str, int]], names: Sequence[str]) -> Html:
    """The share of each language's documents in each fiftieth of scores."""
    curves = []
    for name in names:
        shares = [0.0] * _STEPS
        for score, count in histograms[name].items():
            shares[int(score) * _STEPS // 1000] += count / sum(histograms[name].values())
        curves.append([((step + 0.5) / _STEPS, share) for step, share in enumerate(shares)])
    drawing = Plot(960, 260, (0.0, 1.0), padded([0.0, *(share for curve in curves for _, share in curve)]))
    drawing.axes("score", "share of documents")
    for place, curve in enumerate(curves):
        drawing.line(curve, f"s{place}")
    return drawing.render("Scores by language")


def _duplicates(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    facts = stages.get("deduplicate")
    if facts is None or not facts.get("clusters"):
        return Html("")
    words = (
        f"{q.whole(facts['clusters'])} clusters; {q.whole(facts['exact'])} documents go that equal a better one, "
        f"{q.whole(facts['near'])} that are nearly it. The largest clusters, the member that stays first:"
    )
    sizes = sorted(((int(size), count) for size, count in facts["sizes"].items()))
    largest = [_cluster(each) for each in facts["examples"]]
    return join(
        [element("p", words), *largest, table(["members", "clusters"], [[s, q.whole(c)] for s, c in sizes[:12]])]
    )


def _cluster(example: Mapping[str, Any]) -> Html:
    documents = example["documents"]
    others = [element("li", f"{each['source']}: {each['identifier']}") for each in documents[1:]]
    title = f"{example['size']} documents: {documents[0]['source']}: {documents[0]['identifier']}"
    return element("details", element("summary", title), element("ul", *others), element("pre", documents[0]["text"]))


def _benchmarks(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    facts = stages.get("decontaminate")
    if facts is None:
        return Html("")
    words = (
        f"{q.whole(facts['dropped'].get('hit', [0, 0])[0])} documents go that have text of a benchmark; "
        f"{q.whole(facts['generic'])} of their runs of words are generic: too many documents have them to count."
    )
    counts = table(["benchmark", "documents"], [[name, q.whole(n)] for name, n in facts["benchmarks"].items()])
    tasks = table(["task", "documents"], [[name, q.whole(n)] for name, n in list(facts["tasks"].items())[:20]])
    shown = [
        element(
            "details",
            element("summary", f"{document['source']}: {document['identifier']}: {document['hits'][0]}"),
            element("pre", document["text"]),
        )
        for example in facts["examples"] for document in example["documents"]
    ]  # fmt: skip
    return join([element("p", words), *((counts, tasks) if facts["benchmarks"] else ()), *shown])


def _examples(stages: Mapping[str, Mapping[str, Any]]) -> Html:
    examples = dict(stages.get("clean", stages["read"])["examples"])
    low = {kind: some for kind, some in stages.get("filter", {}).get("examples", {}).items() if kind != "out"}
    return join(_kinds(examples | low))


def _kinds(examples: Mapping[str, Sequence[Sequence[str]]]) -> Iterator[Html]:
    for kind in sorted(examples, key=lambda name: (name != "out", name)):
        title = "kept" if kind == "out" else kind.replace("rule ", "dropped by ").replace("decile ", "scores from 0.")
        inside = [
            element("details", element("summary", f"{source}: {name} ({language or 'not known'})"), element("pre", text))
            for _, source, name, language, text in examples[kind]
        ]  # fmt: skip
        yield element("details", element("summary", f"{title}, {len(inside)} examples"), *inside)
