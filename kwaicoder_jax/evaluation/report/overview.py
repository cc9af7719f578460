"""The top of the page: the recipe in one sentence, and one card a stage."""

from collections.abc import Iterator

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.ledger import losses
from kwaicoder_jax.evaluation.report.markup import Html, element
from kwaicoder_jax.evaluation.report.material import Material, Part

NOTHING = "–"


def headline(material: Material) -> Html:
    """What was done, from the first stage that is there to the last, with its numbers."""
    clauses = [clause for part in material.stages for clause in _clause(material, part)]
    if not clauses:
        return Html("")
    text = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + ", and " + clauses[-1]
    return element("p", f"A model {text}. Losses are validation losses in nats per token.", class_="headline")


def _clause(material: Material, part: Part) -> Iterator[str]:
    pair, tokens = losses(part), part.summary.get("tokens", 0)
    total, active = q.count(part.total), q.count(part.active)
    if part.name == "pretrain" and pair:
        yield f"of {total} parameters was trained on {q.count(tokens)} tokens to a loss of {q.loss(pair[1])}"
    elif part.name == "prune" and pair:
        yield f"pruned to {total} parameters (loss {q.loss(pair[1])})"
    elif part.name == "distill" and pair:
        alone = part.summary.get("valid_loss_end_without_teacher")
        beside = f" ({q.loss(alone)} without the teacher)" if alone is not None else ""
        yield f"distilled from the unpruned model on {q.count(tokens)} tokens to {q.loss(pair[1])}{beside}"
    elif part.name == "upcycle" and pair:
        experts = part.meta.get("model", {}).get("experts") or {}
        kind = f"{experts['num_experts']} experts a layer " if experts else ""
        how = "without loss " if part.summary.get("lossless") else ""
        yield f"upcycled {how}to a mixture of {kind}({total} parameters, {active} of them active for a token)"
    elif pair:
        yield f"trained on {q.count(tokens)} more tokens to {q.loss(pair[1])}"


def flow(material: Material) -> Html:
    """The cards, in the recipe's order."""
    return element("ol", *[_card(part) for part in material.stages], class_="flow")


def _card(part: Part) -> Html:
    big, unit = _key_figure(part)
    facts = list(_facts(part))
    rows = [element("div", element("dt", name), element("dd", value)) for name, value in facts]
    figure = element("p", element("b", big), element("span", unit), class_="figure")
    return element("li", element("h3", part.name), figure, element("dl", *rows))


def _key_figure(part: Part) -> tuple[str, str]:
    summary = part.summary
    if "tokens_train" in summary:
        return q.count(summary["tokens_train"]), "training tokens"
    if part.total or "params_total" in summary:
        return q.count(part.total or summary["params_total"]), "parameters"
    passes = sorted(key for key in summary if key.endswith("_pass_at_1"))
    if passes:
        return q.percent(summary[passes[0]]), "pass@1"
    return (q.loss(summary["valid_loss"]), "held-out loss") if "valid_loss" in summary else (NOTHING, "")


def _short(value: float) -> str:
    """A small number without the spaces that the card has no room for."""
    return q.scientific(value).replace(q.SPACE, "")


def _facts(part: Part) -> Iterator[tuple[str, str]]:
    summary, pair = part.summary, losses(part)
    if part.active and part.active != part.total:
        yield "active", q.count(part.active)
    if pair:
        yield "loss", f"{q.loss(pair[0])} → {q.loss(pair[1])}"
    elif "valid_loss" in summary:
        yield "loss", q.loss(summary["valid_loss"])
    if "steps" in summary and "tokens" in summary:
        yield "tokens", q.count(summary["tokens"])
    for key, name, form in (
        ("documents_train", "documents", q.whole), ("vocab_size", "vocabulary", q.whole),
        ("max_relative_logit_error", "max error", _short), ("fim_exact_match", "FIM exact", q.percent),
        ("seconds", "time", q.duration),
    ):  # fmt: skip
        if key in summary:
            yield name, form(summary[key])
