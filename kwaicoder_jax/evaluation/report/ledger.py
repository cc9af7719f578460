"""Tables: what each stage cost and gave, the evaluation, the data, the config, the lineage."""

import json
from collections.abc import Iterator
from typing import Any

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, join, table
from kwaicoder_jax.evaluation.report.material import Material, Part

NONE = "–"
# Keys of (loss before, loss after) in the summaries, in the order in which they are looked for.
LOSSES = (
    ("valid_loss_start", "valid_loss_end"),
    ("valid_loss_before", "valid_loss_after"),
    ("valid_loss_dense", "valid_loss_moe"),
)


def losses(part: Part) -> tuple[float, float] | None:
    """Validation loss before and after the stage, where it has both."""
    for before, after in LOSSES:
        if before in part.summary and after in part.summary:
            return part.summary[before], part.summary[after]
    return None


def stages(material: Material) -> Html:
    """One row a stage."""
    heads = ("stage", "parameters", "active", "steps", "tokens", "training FLOPs", "loss before", "loss after",
             "time", "peak memory")  # fmt: skip
    rows = []
    for part in material.stages:
        rows.append(_stage(part, part.name))
        if part.name == "distill" and material.baseline is not None:
            rows.append(_stage(material.baseline, "without the teacher"))
    note = "Active: parameters that one token uses. Tokens: those that count in the loss. Loss: validation, nats per token."
    if material.baseline is not None:
        note += " The time and memory of distill include the run without the teacher."
    return join([table(heads, rows), element("p", note, class_="note")])


def _stage(part: Part, name: str) -> list[object]:
    summary = part.summary or _from_metrics(part)
    pair = losses(Part(part.name, summary, {}, [], {}))

    def shown(key: str, form: Any) -> str:
        return form(summary[key]) if key in summary else NONE

    trained = "steps" in summary  # elsewhere "tokens" are tokens that were compared
    return [
        name,
        q.count(part.total) if part.total else NONE,
        q.count(part.active) if part.total else NONE,
        shown("steps", q.whole),
        shown("tokens", q.count) if trained else NONE,
        shown("train_flops", q.flops),
        q.loss(pair[0]) if pair else NONE,
        q.loss(pair[1]) if pair else shown("valid_loss", q.loss),
        shown("seconds", q.duration),
        shown("peak_rss_bytes", q.storage),
    ]


def _from_metrics(part: Part) -> dict[str, Any]:
    """The baseline has no summary of its own."""
    valid = [r["valid_loss"] for r in part.metrics if "valid_loss" in r]
    train = [r for r in part.metrics if "loss" in r]
    found: dict[str, Any] = dict(zip(("valid_loss_start", "valid_loss_end"), (valid[0], valid[-1]))) if valid else {}
    found |= {"steps": train[-1]["step"], "tokens": train[-1]["tokens"]} if train else {}
    progress = part.meta.get("progress", {})
    return found | ({"train_flops": progress["train_flops"]} if "train_flops" in progress else {})


def evaluation(material: Material) -> Html:
    """Everything that the evaluation measured."""
    part = material.part("evaluate")
    if part is None:
        return Html("")
    rows = [[name, value] for name, value in _measures(part.summary)]
    return table(("measure", "value"), rows)


def _measures(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in sorted(summary.items()):
        if key == "valid_loss" or key.startswith("valid_loss_"):
            source = key.removeprefix("valid_loss").removeprefix("_") or "all sources"
            yield f"held-out loss, {source} (nats per token)", q.loss(value)
    for key, value in sorted(summary.items()):
        name, found, rest = key.partition("_pass_at_")
        if found:
            tasks = summary.get(f"{name}_tasks")
            yield f"{name}, pass@{rest}" + (f" ({tasks} tasks)" if tasks else ""), q.percent(value)
    for key, label, form in (
        ("fim_exact_match", "fill in the middle, exact match", q.percent),
        ("fim_edit_similarity", "fill in the middle, edit similarity", lambda value: f"{value:.3f}"),
        ("fim_tasks", "fill in the middle, spans", q.whole),
    ):
        if key in summary:
            yield label, form(summary[key])
    for key, value in sorted(summary.items()):
        if key.endswith("_reference_failures") and value:
            yield f"{key.removesuffix('_reference_failures')}, reference solutions that fail here", q.whole(value)


def data(material: Material) -> Html:
    """Documents and tokens by source."""
    if "sources" not in material.manifest:
        return Html("")
    keys = ("documents_in", "duplicates", "documents_train", "documents_valid", "tokens_train", "tokens_valid")
    heads = ("source", "documents read", "duplicates", "training documents", "validation documents",
             "training tokens", "validation tokens", "bytes per token")  # fmt: skip
    rows = []
    for name, source in sorted(material.manifest["sources"].items()):
        size, tokens = source.get("bytes_train"), source.get("tokens_train")
        rows.append(
            [name, *[_whole(source.get(key)) for key in keys], f"{size / tokens:.2f}" if size and tokens else NONE]
        )
    sums = {key: sum(s.get(key, 0) for s in material.manifest["sources"].values()) for key in keys}
    rows.append([element("b", "all"), *[element("b", _whole(sums[key])) for key in keys], NONE])
    return table(heads, rows)


def _whole(value: float | None) -> str:
    return NONE if value is None else q.whole(value)


def config(material: Material) -> Html:
    """What the stages were run with, as their stage.json has it, in the form of overrides."""
    lines: dict[str, str] = {}
    for part in material.stages:
        for name, value in _flat(part.record.get("config", {})):
            # A section that two stages saw with different values is shown as each saw it.
            lines[name if lines.get(name, value) == value else f"{name} (in {part.name})"] = value
    text = "\n".join(f"{name} = {value}" for name, value in sorted(lines.items()))
    summary = element("summary", f"Configuration: {len(lines)} fields, as the stages were run")
    return element("details", summary, element("pre", element("code", text)))


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flat(each, f"{name}.{key}" if name else key)
    else:
        yield name, json.dumps(value, ensure_ascii=False)


def lineage(material: Material) -> Html:
    """Which stage was made from which, by which version."""
    names = {part.record.get("identity"): part.name for part in material.stages}
    rows = []
    for part in material.stages:
        made = ", ".join(
            f"{role}: {names.get(identity, identity)}"
            for role, identity in sorted(part.record.get("inputs", {}).items())
        )
        identity, commit = part.record.get("identity", NONE), part.summary.get("git_commit", NONE)[:12]
        started = part.summary.get("started_at", NONE).replace("T", " ").removesuffix("+00:00")
        rows.append([part.name, element("code", identity), made or NONE, started, element("code", commit)])
    return table(("stage", "identity", "made from", "started (UTC)", "commit"), rows, text_columns=5)
