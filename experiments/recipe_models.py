"""The models of a recipe, from its config alone: what each stage would leave, before any of them has run."""

from collections.abc import Mapping
from typing import Any

from experiments.contract import WITH_CHECKPOINT
from experiments.training_stage import build
from kwaicoder_jax import models, transforms
from kwaicoder_jax.errors import UserError


def model_before(config: Mapping[str, Any], stage: str) -> models.ModelConfig:
    """The model that `stage` starts from, if the stages before it do as the config says."""
    stages = list(config["stages"])
    before = stages[: stages.index(stage)] if stage in stages else stages
    if "model" not in config or "vocab_size" not in config["model"]:
        remedy = "write the sizes of the first model there, with its vocab_size"
        raise UserError("is needed to know the shapes", where="model", remedy=remedy)
    model = build(models.ModelConfig, dict(config["model"]), "model")
    for name in before:
        if name in WITH_CHECKPOINT:
            model = _after(config, name, model)
    return model


def teacher_of(config: Mapping[str, Any]) -> models.ModelConfig:
    """The teacher of `distill`."""
    named = config["distill"].get("teacher") or "pretrain"
    stages = list(config["stages"])
    if named not in stages:
        raise UserError(f"no stage {named!r} in this recipe", where="distill.teacher", remedy="name one of its stages")
    return _after(config, named, model_before(config, named))


def _after(config: Mapping[str, Any], stage: str, model: models.ModelConfig) -> models.ModelConfig:
    section = config.get(stage, {})
    if stage == "prune":
        target = build(transforms.Target, dict(section["target"]), "prune.target")
        return target.apply(model, list(range(target.resolve(model).layers or model.layers)))
    if stage == "upcycle":
        # What its shapes depend on, without what is measured on data.
        names = (
            "granularity", "replicas", "top_replicas", "experts_per_token", "router", "routed_scale", "router_bias",
            "scale_placement", "allow_lossy",
        )  # fmt: skip
        record = transforms.upcycle.plan(model, **{name: section[name] for name in names})
        return models.ModelConfig.from_dict(record["config_after"])
    return model
