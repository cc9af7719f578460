"""Every shape that a model can be cut to inside a budget, and the few of them that are worth a measurement."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kwaicoder_jax import hardware, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import depth
from kwaicoder_jax.transforms.costs import Cost, Costs, Serving
from kwaicoder_jax.transforms.retained import SCORES, kept_share
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target, present

WHERE = "prune.search"
MOST = 2_000_000  # shapes that are enumerated: some minutes
_MULTIPLES = {"model_dim": 64, "mlp_dim": 64, "expert_dim": 64, "shared_dim": 64}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a shape may cost at most; None for no limit.

    Attributes:
      max_params: parameters.
      max_active_params: parameters that one token uses.
      max_bytes: bytes of the weights in `param_dtype`.
      max_latency: seconds of a decode step, see `costs.Costs`; needs a chip.
      chip: a name of the chip table.
      context: tokens in the cache of each sequence.
      batch: sequences decoded together.
    """

    max_params: int | None = None
    max_active_params: int | None = None
    max_bytes: int | None = None
    max_latency: float | None = None
    chip: str | None = None
    context: int = 4096
    batch: int = 1

    def limits(self) -> dict[str, float]:
        """Limits by field of Cost."""
        fields = {"params": self.max_params, "active": self.max_active_params, "bytes": self.max_bytes}
        fields["latency"] = self.max_latency  # type: ignore[assignment]
        return {name: limit for name, limit in fields.items() if limit is not None}

    def serving(self) -> Serving | None:
        """What latency is estimated for; None where no chip is named."""
        if self.chip is None:
            if self.max_latency is not None:
                choices = ", ".join(hardware.CHIPS)
                raise UserError("a latency needs a chip", where=f"{WHERE}.chip", remedy=f"use {choices}")
            return None
        return Serving(hardware.chip(self.chip, f"{WHERE}.chip"), self.context, self.batch)


@dataclasses.dataclass(frozen=True)
class Space:
    """Which shapes are looked at.

    A size that is present stays a choice whatever the rules are, except for `granularity`. KV heads and query heads
    in each KV group are chosen independently, so every grouped-query layout is a choice.

    Attributes:
      multiples: by field of Target, what a size has to be a multiple of; 64 for widths, 1 for the rest, unless given.
      minimum: by field of Target, the least share of a size that is kept; `least` unless given. 1 leaves an axis alone.
      least: see `minimum`.
      granularity: has to divide mlp_dim, so that the student can be upcycled with it.
    """

    multiples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    minimum: Mapping[str, float] = dataclasses.field(default_factory=dict)
    least: float = 0.5
    granularity: int = 1

    def __post_init__(self):
        known = {field.name for field in dataclasses.fields(Target)}
        for name in ("multiples", "minimum"):
            given = {key: value for key, value in getattr(self, name).items() if value is not None}
            if unknown := sorted(set(given) - known):
                raise UserError(
                    "no such size", where=f"{WHERE}.{name}.{unknown[0]}", remedy=f"the sizes are {sorted(known)}"
                )
            for key, value in given.items():
                if not value > 0 or (name == "minimum" and value > 1):
                    raise UserError(f"{value} cannot be", where=f"{WHERE}.{name}.{key}", remedy="use 1 or more"
                                    if name == "multiples" else "use a share above 0, at most 1")  # fmt: skip
            object.__setattr__(self, name, given)

    def choices(self, name: str, have: int) -> list[int]:
        """The sizes of one axis, ascending."""
        multiple = self.multiples.get(name, _MULTIPLES.get(name, 1))
        least = math.ceil(self.minimum.get(name, self.least) * have - 1e-9)
        sizes = {size for size in range(max(least, 1), have + 1) if size % multiple == 0} | {have}
        return sorted(size for size in sizes if name != "mlp_dim" or size % self.granularity == 0)


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape: a resolved target, its cost, and the logarithm of the share of importance that it keeps."""

    target: Target
    cost: Cost
    kept: float = 0.0


def enumerate_shapes(
    config: models.ModelConfig,
    scores: Scores,
    budget: Budget,
    space: Space,
    *,
    protect_ends: bool = True,
    head_merge: bool = False,
    layer_scores: str = depth.LayerScores.INFLUENCE,
) -> list[Shape]:
    """Every shape of `space` inside `budget`, each once, in a fixed order; axes without scores are left alone.

    Raises:
      UserError: nothing fits; the model fits as it is; no limit; more than MOST shapes.
    """
    if not (limits := budget.limits()):
        raise UserError("there is no budget", where=f"{WHERE}.max_params", remedy="set one of the max_ fields")
    serving, costs = budget.serving(), Costs(config)
    targets = _targets(config, scores, space, protect_ends, head_merge)
    priced = [(target, costs.of(target, serving)) for target in targets]
    if not any(_over(costs.of(Target(), serving), limits)):
        raise UserError("the model is inside the budget as it is", where=WHERE, remedy="lower the limit")
    fitting = [(target, cost) for target, cost in priced if not any(_over(cost, limits))]
    if not fitting:
        name = next(iter(limits))
        least = min(getattr(cost, name) for _, cost in priced)
        raise UserError(
            f"no shape of the {len(priced)} is inside the budget; the least {name} of any is {least:,}", where=WHERE,
            remedy="raise the limit, or lower prune.search.least and prune.search.multiples",
        )  # fmt: skip
    share = kept_share(config, scores, protect_ends, layer_scores)
    return [Shape(target, cost, share(target)) for target, cost in fitting]


def _over(cost: Cost, limits: Mapping[str, float]) -> Iterable[bool]:
    return (getattr(cost, name) > limit for name, limit in limits.items())


def _targets(
    config: models.ModelConfig, scores: Scores, space: Space, protect_ends: bool, head_merge: bool
) -> Iterable[Target]:
    """Every resolved target of the space."""
    have = present(config)
    used = have.pop("experts_per_token", None)
    per_group = have["heads"] // have["kv_heads"]
    choices: dict[str, list[Any]] = {}
    for name, size in have.items():
        measured = name not in SCORES or getattr(scores, SCORES[name]) is not None
        choices[name] = space.choices(name, size) if measured else [size]
        if not choices[name]:
            raise UserError(
                f"no size of {name} from {space.least:g} of {size} on is a multiple of {space.granularity}",
                where=f"{WHERE}.granularity", remedy="use a smaller granularity or prune.search.minimum",
            )  # fmt: skip
    if protect_ends:
        choices["layers"] = [n for n in choices["layers"] if n >= min(2, have["layers"])]
    if used is not None:
        choices["experts"] = [n for n in choices["experts"] if n >= used]
    allowed = set(choices.pop("heads"))
    least = math.ceil(per_group / 2) if head_merge else 1
    choices["kv_heads"] = [
        (k, k * n) for k in choices["kv_heads"] for n in range(least, per_group + 1) if k * n in allowed
    ]
    if math.prod(map(len, choices.values())) > MOST:
        raise UserError(
            f"{math.prod(map(len, choices.values())):,} shapes are more than {MOST:,}", where=f"{WHERE}.multiples",
            remedy="use larger multiples, or leave axes alone with prune.search.minimum=1",
        )  # fmt: skip
    for values in itertools.product(*choices.values()):
        sizes = dict(zip(choices, values))
        sizes["kv_heads"], sizes["heads"] = sizes["kv_heads"]
        yield Target(**sizes, experts_per_token=used)


def spread(shapes: Sequence[Shape], count: int) -> list[Shape]:
    """The `count` shapes to measure: the best by the proxy of every depth and width in turn, not the largest.

    Shapes of one depth and one model_dim are ranked by what they keep; depths take turns, and inside a depth its
    widths. So a search of few candidates still sees every depth, and one of many sees several splits of each.
    """
    by_depth: dict[Any, dict[Any, list[Shape]]] = {}
    for shape in shapes:
        by_depth.setdefault(shape.target.layers, {}).setdefault(shape.target.model_dim, []).append(shape)
    ranked = [
        _in_turn([sorted(same, key=lambda s: -s.kept) for same in widths.values()]) for widths in by_depth.values()
    ]
    return _in_turn(ranked)[:count]


def _in_turn(lists: Iterable[list[Shape]]) -> list[Shape]:
    """One of each list in turn, the list with the best first shape first."""
    ordered = sorted(lists, key=lambda each: -each[0].kept)
    turns = itertools.zip_longest(*ordered)
    return [shape for turn in turns for shape in turn if shape is not None]
