"""The shape to prune to: sizes, what they mean in a model's config, and which of them cannot be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError

WHERE = "prune.target"
_OF_EXPERTS = {"experts": "num_experts", "expert_dim": "mlp_dim", "shared_dim": "shared_mlp_dim",
               "experts_per_token": "experts_per_token"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """The sizes to prune to; None keeps the size.

    Attributes:
      layers: L.
      model_dim: D, channels.
      mlp_dim: F, neurons of the dense MLP; not for a mixture.
      heads: H, query heads; the same number in each KV group. Under latent attention K is H, and either says both.
      kv_heads: K, KV heads, each with its query heads.
      experts: E, experts of each layer of a mixture.
      expert_dim: neurons of each expert.
      shared_dim: neurons of the shared expert.
      experts_per_token: X; has to be asked for when fewer experts are kept than a token uses.
    """

    layers: int | None = None
    model_dim: int | None = None
    mlp_dim: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    experts: int | None = None
    expert_dim: int | None = None
    shared_dim: int | None = None
    experts_per_token: int | None = None

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if isinstance(size, list | tuple):
                raise UserError(
                    f"{list(size)} is a size for each layer; the layers are one scan over identical layers, with one "
                    "stacked array for each parameter",
                    where=f"{WHERE}.{name}", remedy="give one number for all layers",
                )  # fmt: skip
            if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
                raise UserError(f"{size!r} is not a whole number", where=f"{WHERE}.{name}")

    def resolve(self, config: models.ModelConfig) -> "Target":
        """The target with every size of the model filled in; UserError names the field that cannot be.

        What the model does not have (experts of a dense model, the dense MLP of a mixture) stays None.
        """
        have, sizes, given = present(config), {}, dataclasses.asdict(self)
        if config.mla is not None:  # every query head has its own key and value
            either = self.kv_heads if self.heads is None else self.heads
            given |= {name: either for name in ("heads", "kv_heads") if given[name] is None}
        for name, asked in given.items():
            if name not in have:
                if asked is not None:
                    raise UserError(f"the model has no {name}", where=f"{WHERE}.{name}", remedy=_instead(name))
                continue
            sizes[name] = have[name] if asked is None else asked
            if not 1 <= sizes[name] <= have[name]:
                raise UserError(
                    f"{asked} cannot be kept of {have[name]}", where=f"{WHERE}.{name}", remedy=f"use 1 to {have[name]}"
                )
        _check_heads(config, sizes["heads"], sizes["kv_heads"])
        _check_norm(config, sizes["heads"], sizes["kv_heads"])
        if sizes.get("experts", 1) < sizes.get("experts_per_token", 1):
            raise UserError(
                f"a token uses {sizes['experts_per_token']} experts of the {sizes['experts']} that are kept",
                where=f"{WHERE}.experts",
                remedy=f"keep {sizes['experts_per_token']} or more, or set {WHERE}.experts_per_token",
            )
        if config.experts is not None and config.experts.limited and sizes["experts"] < have["experts"]:
            raise UserError(
                f"a token's experts come from {config.experts.top_groups} of {config.experts.groups} groups of equal size",
                where=f"{WHERE}.experts", remedy="leave it out, or set model.experts.groups and top_groups to 1",
            )  # fmt: skip
        return Target(**sizes)

    def apply(self, config: models.ModelConfig, layers: Sequence[int] | None = None) -> models.ModelConfig:
        """The config of `config`'s model cut to this target.

        Args:
          config: the model.
          layers: those that are kept, for their windows; default the first ones.
        """
        sizes = {name: size for name, size in dataclasses.asdict(self.resolve(config)).items() if size is not None}
        inside = {field: sizes.pop(name) for name, field in _OF_EXPERTS.items() if name in sizes}
        if config.experts is not None:
            sizes["experts"] = dataclasses.replace(config.experts, **inside, **_ungrouped(config.experts))
        if config.windows:
            kept = range(sizes["layers"]) if layers is None else layers
            sizes["windows"] = tuple(config.windows[layer] for layer in kept)  # type: ignore[assignment]
        return config.replace(**sizes)


def present(config: models.ModelConfig) -> dict[str, int]:
    """The sizes that a model has, by field of Target; UserError for a model that cannot be cut."""
    check_one_stack(config)
    names = ["layers", "model_dim", "mlp_dim", "heads", "kv_heads"]
    if config.experts is None:
        return {name: getattr(config, name) for name in names}
    names.remove("mlp_dim")
    sizes = {name: getattr(config, name) for name in names}
    sizes |= {name: getattr(config.experts, field) for name, field in _OF_EXPERTS.items()}
    return {name: size for name, size in sizes.items() if size}


def check_one_stack(config: models.ModelConfig) -> None:
    """UserError for a model with dense layers before its mixture: measuring and cutting know one stack of layers."""
    if config.dense_layers:
        raise UserError(
            f"{config.dense_layers} dense layers before a mixture are two stacks, and pruning knows one",
            where="model.dense_layers", remedy="prune a model whose layers are all alike",
        )  # fmt: skip


def axes(sizes: dict[str, Any]) -> dict[str, int]:
    """Sizes of Target as sizes of the axes that parameters declare."""
    names = {"layers": "layers", "model_dim": "embed", "mlp_dim": "mlp", "heads": "heads", "kv_heads": "kv_heads",
             "experts": "experts", "expert_dim": "expert_mlp", "shared_dim": "shared_mlp"}  # fmt: skip
    return {axis: sizes[name] for name, axis in names.items() if sizes.get(name) is not None}


def _instead(name: str) -> str:
    return "for the neurons of a mixture set expert_dim" if name == "mlp_dim" else "leave it out"


def _ungrouped(experts: models.ExpertsConfig) -> dict[str, Any]:
    """Groups that keep a token from nothing do not survive: fewer experts need not form them."""
    return {} if experts.limited else {"groups": 1, "top_groups": 1}


def _check_norm(config: models.ModelConfig, heads: int, groups: int) -> None:
    if config.qk_norm is models.QkNorm.FULL and (heads, groups) != (config.heads, config.kv_heads):
        raise UserError(
            "queries and keys are normed over all heads together (model.qk_norm is full), so that without some of them "
            "the others would change", where=f"{WHERE}.heads", remedy="keep heads and kv_heads",
        )  # fmt: skip


def _check_heads(config: models.ModelConfig, heads: int, groups: int) -> None:
    per_group = config.heads // config.kv_heads
    choices = ", ".join(str(groups * n) for n in range(1, per_group + 1))
    remedy = f"with {groups} KV heads use one of {choices}"
    if heads % groups:
        raise UserError(
            f"{heads} query heads do not share {groups} KV heads evenly", where=f"{WHERE}.heads", remedy=remedy
        )
    if heads // groups > per_group:
        raise UserError(
            f"{heads} query heads need {heads // groups} in each of {groups} KV groups, which hold {per_group}",
            where=f"{WHERE}.heads", remedy=remedy,
        )  # fmt: skip
