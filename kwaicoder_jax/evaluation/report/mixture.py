"""Upcycling: how exact it was, and which experts came from where."""

from typing import Any

from kwaicoder_jax.evaluation.report import quantities as q
from kwaicoder_jax.evaluation.report.markup import Html, element, figure
from kwaicoder_jax.evaluation.report.material import Material
from kwaicoder_jax.evaluation.report.svg import drawing, rectangle, text

SHOWN = 16  # shards or replicas drawn; a larger mixture is described in words


def upcycling(material: Material) -> Html:
    """Figures of exactness beside a drawing of the experts."""
    part = material.part("upcycle")
    if part is None:
        return Html("")
    record, summary = material.step("upcycle"), part.summary
    facts = _exactness(summary) + _shape(record)
    listed = element("dl", *[element("div", element("dt", name), element("dd", value)) for name, value in facts])
    figures = []
    if record and max(record["granularity"], record["replicas"]) <= SHOWN:
        figures.append(figure("Experts of a layer", _experts(record), _explain(record)))
    errors = material.verify.get("layer_relative_error_L") or []
    if errors:
        figures.append(figure("Relative error of the residual stream", _errors(errors), "After each layer, on the "
                              "validation documents: root of Σ|mixture − dense|² over Σ|dense|²."))  # fmt: skip
    return element("div", listed, element("div", *figures), class_="columns")


def _exactness(summary: dict[str, Any]) -> list[tuple[str, str]]:
    names = (
        ("max_relative_logit_error", "largest logit error, relative to the largest logit", q.scientific),
        ("kl_dense_to_moe", "mean divergence KL(dense ‖ mixture), nats", q.scientific),
        ("valid_loss_dense", "validation loss, dense, nats per token", q.loss),
        ("valid_loss_moe", "validation loss, mixture, nats per token", q.loss),
        ("tokens", "tokens compared", q.whole),
    )
    return [(label, show(summary[name])) for name, label, show in names if name in summary]


def _shape(record: dict[str, Any]) -> list[tuple[str, str]]:
    if not record:
        return []
    factors = ", ".join(f"{name.rsplit('/', 1)[-1]} × {factor:g}" for name, factor in sorted(record["factors"].items()))
    return [
        ("granularity: shards of each MLP", q.whole(record["granularity"])),
        ("replicas of each shard", q.whole(record["replicas"])),
        ("experts a token uses, of all", f"{record['experts_per_token']} of {record['granularity'] * record['replicas']}"),
        ("router", record["router"]),
        ("scale of the experts' output", f"{record['scale']:g} ({record['scale_placement']}: {factors})"),
        ("partition of the neurons", record["partition"]["method"]),
        ("function unchanged by construction", "yes" if record["lossless"] else "no"),
    ]  # fmt: skip


def _explain(record: dict[str, Any]) -> str:
    width = record["config_after"]["experts"]["mlp_dim"]
    return (
        f"Each column is one shard of {width} of the dense MLP's {record['config_before']['mlp_dim']} neurons, each row "
        f"a replica. At the start the router sends a token to all shards of {record['top_replicas']} of the "
        f"{record['replicas']} replicas: together these shards are the dense MLP."
    )


def _experts(record: dict[str, Any]) -> Html:
    shards, replicas = record["granularity"], record["replicas"]
    cell = min(52.0, 380 / shards)
    parts = [text(78 + cell * (g + 0.5), 16, f"shard {g}" if cell > 45 else g, "tick", "middle") for g in range(shards)]
    for r in range(replicas):
        parts.append(text(70, 24 + cell * 0.6 * (r + 0.5) + 4, f"replica {r}", "tick", "end"))
        for g in range(shards):
            x, y = 78 + cell * g, 24 + cell * 0.6 * r
            parts.append(rectangle(x + 1.5, y + 1.5, cell - 3, cell * 0.6 - 3, f"shard g{g % 4}"))
            parts.append(text(x + cell / 2, y + cell * 0.3 + 4, r * shards + g, "tick", "middle"))
    return drawing(470, 30 + cell * 0.6 * replicas, parts, "experts by replica and shard")


def _errors(errors: list[float]) -> Html:
    top, pitch = max(errors), 22
    parts = []
    for layer, error in enumerate(errors):
        length = 250 * error / top if top > 0 else 0
        parts.append(text(60, 15 + pitch * layer, f"layer {layer}", "tick", "end"))
        parts.append(rectangle(68, 4 + pitch * layer, max(length, 0.5), 14, "fill kept"))
        parts.append(text(74 + length, 15 + pitch * layer, q.scientific(error), "tick"))
    return drawing(470, 6 + pitch * len(errors), parts, "relative error by layer")
