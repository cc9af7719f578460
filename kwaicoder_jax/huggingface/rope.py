"""Rotary positions: `rope_theta` and `rope_scaling` of a config.json, or `rope_parameters` as transformers 5 writes."""

import dataclasses
from typing import Any

from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.models import ModelConfig, RopeKind, RopeScaling

_NUMBERS = {  # by kind, the fields of RopeScaling that matter to it, and whether config.json has to have them
    RopeKind.LINEAR: {"factor": True},
    RopeKind.DYNAMIC: {"factor": True},
    RopeKind.YARN: {
        "factor": False, "beta_fast": False, "beta_slow": False, "mscale": False, "mscale_all_dim": False,
        "attention_factor": False,
    },
    RopeKind.LLAMA3: {"factor": True, "low_freq_factor": True, "high_freq_factor": True},
}  # fmt: skip
_ORIGINAL = "original_max_position_embeddings"
_WITH_ORIGINAL = (RopeKind.YARN, RopeKind.LLAMA3)


def read(fields: Fields, default_theta: float, max_length: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of ModelConfig; UserError for a kind that there is not."""
    part = fields.part("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, dict) for value in part.values.values()):
        raise fields.error("rope_parameters", "differ from layer to layer", "only one for all layers can be imported")
    theta = part.optional("rope_theta") or fields.number("rope_theta", default_theta)
    kind = part.get("rope_type", part.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind not in list(RopeKind):
        raise part.error(
            "rope_type", f"there is no {kind!r} here", f"only default, {', '.join(RopeKind)} can be imported"
        )
    kind = RopeKind(kind)
    values: dict[str, Any] = {}
    for name, needed in _NUMBERS[kind].items():
        if needed or part.get(name) != 0:  # 0 is as good as absent, for mscale and the like
            values[name] = part.number(name) if needed else part.optional(name)
    if kind in _WITH_ORIGINAL:
        original = fields.get(_ORIGINAL) or part.get(_ORIGINAL) or max_length  # in transformers' order
        values |= {"original_length": original, "truncate": part.flag("truncate", True)}
        values["factor"] = values.get("factor") or max_length / original
    known = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, **known)}


def write(config: ModelConfig) -> dict[str, Any]:
    """The two fields as every reader of the format knows them (those of transformers 4, which 5 reads as well)."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    values: dict[str, Any] = {"rope_type": str(scaling.kind)}
    values |= {name: getattr(scaling, name) for name in _NUMBERS[scaling.kind] if getattr(scaling, name) is not None}
    if scaling.kind in _WITH_ORIGINAL:
        values[_ORIGINAL] = scaling.original_length
    if scaling.kind is RopeKind.YARN and not scaling.truncate:
        values["truncate"] = False
    return {"rope_theta": config.rope_theta, "rope_scaling": values}


def plain(scaling: RopeScaling | None) -> RopeScaling | None:
    """The same function with the fields that its kind does not read at their defaults."""
    if scaling is None:
        return None
    used = {*_NUMBERS[scaling.kind], *(("original_length", "truncate") if scaling.kind in _WITH_ORIGINAL else ())}
    if scaling.kind is RopeKind.LLAMA3:
        used.remove("truncate")
    return RopeScaling(scaling.kind, **{
        field.name: getattr(scaling, field.name) for field in dataclasses.fields(scaling) if field.name in used
    })  # fmt: skip
