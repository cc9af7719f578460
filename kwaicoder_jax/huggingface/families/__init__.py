"""The families of models that can be imported and exported, and which of them a model of ours can leave as."""

import dataclasses
from typing import Any

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import rope
from kwaicoder_jax.huggingface.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_MOE
from kwaicoder_jax.huggingface.families.dense import LLAMA, MISTRAL, QWEN2, QWEN3
from kwaicoder_jax.huggingface.families.family import LAYER, STACKS, Family, Filler, Rules
from kwaicoder_jax.huggingface.families.mixtures import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.models import GroupScore, ModelConfig, Router

__all__ = ["FAMILIES", "LAYER", "STACKS", "Family", "Filler", "Rules", "choose", "family_of", "read", "write"]

# In the order in which an export tries them.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        MIXTRAL,
        QWEN3_MOE,
        QWEN2_MOE,
        OLMOE,
        GLM4_MOE,
        DEEPSEEK_V3,
        DEEPSEEK_V2,
    )
}


def family_of(fields: Fields) -> Family:
    """The family of a config.json; UserError if it is none of ours."""
    name, architectures = fields.get("model_type"), fields.get("architectures", [])
    remedy = f"the families are {', '.join(FAMILIES)}"
    if name not in FAMILIES:
        raise fields.error("model_type", f"there is no family {name!r}" if name else "is missing", remedy)
    if architectures and architectures != [FAMILIES[name].architecture]:
        raise fields.error(
            "architectures", f"{architectures} is not {FAMILIES[name].architecture}", "use a causal model"
        )
    return FAMILIES[name]


def read(fields: Fields) -> tuple[Family, ModelConfig]:
    """Family and model of a config.json; a UserError names a field that has no counterpart."""
    family = family_of(fields)
    try:
        return family, family.read(fields)
    except UserError as error:
        if error.where.startswith(fields.where):
            raise
        raise UserError(error.what, where=f"{fields.where}: {error.where}", remedy=error.remedy) from error


def write(family: Family, config: ModelConfig) -> tuple[dict[str, Any], list[str]]:
    """The config.json of a model as one of the family, and the fields of ours that stand in the way (none: it is exact).

    What the family makes of it is what reading it gives, so a field that it does not have, or that is added to
    ModelConfig one day, shows as a difference.
    """
    if (config.experts is None) != (family in (LLAMA, MISTRAL, QWEN2, QWEN3)):
        return {}, ["model.experts"]
    try:
        values = family.write(config)
        again = family.read(Fields(values, "config.json"))
    except UserError as error:
        return {}, [error.where.removeprefix("config.json: ")]
    return {"architectures": [family.architecture], "model_type": family.model_type, **values}, _differences(
        config, again
    )


def choose(
    config: ModelConfig, *, named: str | None = None, preferred: str | None = None
) -> tuple[Family, dict[str, Any]]:
    """The family that represents a model exactly, and its config.json.

    Args:
      config: with `max_length` set.
      named: the one family to take.
      preferred: tried first, as the one that the model came from.

    Raises:
      UserError: no family does (or not the one named); it names the fields that stand in the way.
    """
    if named is not None and named not in FAMILIES:
        raise UserError(f"there is no family {named!r}", where="--family", remedy=f"use one of {', '.join(FAMILIES)}")
    names = [named] if named else sorted(FAMILIES, key=lambda name: name != preferred)
    obstacles = {}
    for name in names:
        values, obstacles[name] = write(FAMILIES[name], config)
        if not obstacles[name]:
            return FAMILIES[name], values
    kinds = {name: fields for name, fields in obstacles.items() if fields != ["model.experts"]} or obstacles
    nearest = sorted(kinds, key=lambda name: len(kinds[name]))
    shown = "; ".join(f"{name}: {', '.join(kinds[name])}" for name in nearest)
    raise UserError(
        f"no family of transformers holds this model exactly; what stands in the way of {shown}",
        where=kinds[nearest[0]][0], remedy="change that field, or load the checkpoint with this library",
    )  # fmt: skip


def _differences(config: ModelConfig, again: ModelConfig) -> list[str]:
    before, after = (_flat(_plain(each).to_dict()) for each in (config, again))
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def _flat(values: dict[str, Any], prefix: str = "model") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        place = f"{prefix}.{name}"
        flat |= _flat(value, place) if isinstance(value, dict) else {place: value}
    return flat


def _plain(config: ModelConfig) -> ModelConfig:
    """The same function, with fields that have no effect on it at one value."""
    changes: dict[str, Any] = {
        "dtype": "float32",
        "param_dtype": "float32",
        "rope_scaling": rope.plain(config.rope_scaling),
    }
    if config.rotary_dim == config.head_dim:
        changes["rotary_dim"] = None
    if (experts := config.experts) is not None:
        if experts.router is Router.TOPK_SOFTMAX:
            experts = dataclasses.replace(experts, router=Router.SOFTMAX_TOPK_RENORMALISED)
        if experts.router is Router.SIGMOID:  # without a bias it is the same as with one of zeros, which fillers write
            experts = dataclasses.replace(experts, router_bias=True)
        if not experts.limited:
            experts = dataclasses.replace(experts, groups=1, top_groups=1, group_score=GroupScore.MAX)
        changes["experts"] = experts
        if not config.dense_layers:
            changes |= {"mlp_dim": 1, "mlp_bias": config.mlp_bias and bool(experts.shared_mlp_dim)}
    return config.replace(**changes)
