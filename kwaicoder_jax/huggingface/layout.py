"""One family's tensors against one model's parameters: every name on both sides, and what goes where."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface.families import LAYER, STACKS, Family
from kwaicoder_jax.huggingface.rules import Rule, copy_into
from kwaicoder_jax.huggingface.weights import DTYPES, Weights

_MTP = re.compile(r"^model\.layers\.(\d+)\.")
_COMPARED = 2**26  # bytes of two tensors that are compared at once
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.masked_bias$")  # old checkpoints hold what is computed


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of theirs, and the part of a parameter of ours that it is.

    Attributes:
      theirs: its name.
      shape: its shape.
      ours: the parameter; None for a filler of zeros.
      layer: index on our axis of layers, if there is one.
      expert: index on our axis of experts, if every expert is a tensor of its own.
      dtype: if it is not the weights' own.
    """

    theirs: str
    shape: tuple[int, ...]
    ours: str | None = None
    layer: int | None = None
    expert: int | None = None
    dtype: np.dtype | None = None


class Layout:
    """Where every parameter of a model lies in a family's files.

    Attributes:
      declared: what the model declares, by name.
    """

    def __init__(self, family: Family, config: models.ModelConfig, rules: Mapping[str, Rule] | None = None,
                 layer_prefix: str = LAYER):  # fmt: skip
        """Args: the family; a model that it represents; other rules than the family's, with another prefix of layers."""
        self.config, self.declared, self._prefix = config, models.declarations(config), layer_prefix
        self._fillers = family.fillers(config) if config.experts is not None and rules is None else []
        of_layer = family.rules(config) if rules is None else rules
        self._rules = {name: of_layer[self._inside(name)] for name in self.declared}

    @staticmethod
    def _inside(name: str) -> str:
        """A parameter's name inside its layer."""
        return next((name.removeprefix(stack) for stack in STACKS if name.startswith(stack)), name)

    def is_layered(self, name: str) -> bool:
        """Whether the parameter's first axis is layers."""
        return name.startswith(STACKS)

    def rule(self, name: str) -> Rule:
        """How a parameter of ours lies."""
        return self._rules[name]

    def tail(self, name: str) -> tuple[int, ...]:
        """The shape of what one tensor holds of it: without layers, and without experts where each has its own."""
        return self.declared[name].shape[int(self.is_layered(name)) + int(self._rules[name].each_expert) :]

    def _first_layer(self, name: str) -> int:
        return 0 if name.startswith(STACKS[0]) else self.config.dense_layers

    def theirs(self, name: str, layer: int | None = None, expert: int | None = None) -> str:
        """The name of the tensor that holds a part of our parameter."""
        text = self._rules[name].theirs
        if layer is None:
            return text
        return (self._prefix + text).format(layer=self._first_layer(name) + layer, expert=expert)

    def slots(self) -> Iterator[Slot]:
        """Every tensor of theirs, in the order of the model."""
        plain = [name for name in self._rules if not self.is_layered(name)]
        yield from (self._slot(name) for name in plain if name == "embedding")
        for stack in STACKS:
            names = [name for name in self._rules if name.startswith(stack)]
            for layer in range(self.declared[names[0]].shape[0] if names else 0):
                for name in names:
                    yield from self._of_layer(name, layer)
                if any(name.startswith(f"{stack}moe/") for name in names):
                    for filler in self._fillers:
                        place = self._prefix.format(layer=self.config.dense_layers + layer)
                        dtype = np.dtype(filler.dtype) if filler.dtype else None
                        yield Slot(place + filler.theirs, filler.shape, dtype=dtype)
        yield from (self._slot(name) for name in plain if name != "embedding")

    def _of_layer(self, name: str, layer: int) -> Iterator[Slot]:
        if not self._rules[name].each_expert:
            yield self._slot(name, layer)
            return
        for expert in range(self.declared[name].shape[1]):
            yield self._slot(name, layer, expert)

    def _slot(self, name: str, layer: int | None = None, expert: int | None = None) -> Slot:
        declared = np.dtype(self.declared[name].dtype)
        fixed = None if declared == np.dtype(self.config.param_dtype) else declared
        shape = self._rules[name].their_shape(self.tail(name))
        return Slot(self.theirs(name, layer, expert), shape, name, layer, expert, fixed)

    def gather(self, weights: Weights, name: str, index: Sequence[slice], dtype: np.dtype) -> np.ndarray:
        """A part of our parameter from their tensors; `index` has a slice with step 1 for each of our axes.

        Only the rows that are needed are read, and of those only the parts that are needed are touched.
        """
        shape, rule = self.declared[name].shape, self._rules[name]
        ranges = [range(*each.indices(size)) for each, size in zip(index, shape, strict=True)]
        outer = len(shape) - len(self.tail(name))
        out = np.empty([len(each) for each in ranges], dtype)
        for at in np.ndindex(*[len(each) for each in ranges[:outer]]):
            numbers = [each[i] for each, i in zip(ranges, at)]
            layer = numbers.pop(0) if self.is_layered(name) else None
            weight = weights[self.theirs(name, layer, *numbers)]
            copy_into(out[at], rule.to_ours(weight.rows, self.tail(name), index[outer:]))
        return out

    def check(self, weights: Weights, family: Family) -> None:
        """UserError for a tensor that is missing, has another shape, is no number of ours, or belongs to nothing."""
        slots = {slot.theirs: slot for slot in self.slots()}
        for name, slot in slots.items():
            if name not in weights:
                if slot.ours is None:
                    continue
                remedy = "config.json or the files are of another model"
                raise UserError("is missing", where=weights.file_of(name), remedy=remedy)
            weight = weights[name]
            if weight.shape != slot.shape:
                what = f"has shape {list(weight.shape)}, config.json says {list(slot.shape)}"
                raise UserError(what, where=weights.file_of(name), remedy="config.json or the file is of another model")
            if weight.dtype not in DTYPES.values():
                remedy = "use weights in float32, bfloat16 or float16"
                raise UserError(f"is stored as {weight.stored}", where=weights.file_of(name), remedy=remedy)
        for name in weights:
            if name not in slots and not self._is_left_out(name, family):
                remedy = "config.json is of another model"
                raise UserError("belongs to nothing in config.json", where=weights.file_of(name), remedy=remedy)
        self._check_tied(weights)

    def _check_tied(self, weights: Weights) -> None:
        """A head that is there although config.json ties it has to be the embedding."""
        if not self.config.tie_embeddings or "lm_head.weight" not in weights:
            return
        head, table = weights["lm_head.weight"], weights[self.theirs("embedding")]
        same, step = head.shape == table.shape, max(1, _COMPARED * table.shape[0] // max(1, table.nbytes))
        for start in range(0, table.shape[0], step) if same else ():
            stop = min(start + step, table.shape[0])
            same = same and np.array_equal(head.rows(start, stop), table.rows(start, stop))
        if not same:
            what = "is not the embedding, though config.json ties them"
            raise UserError(what, where=weights.file_of("lm_head.weight"), remedy="set tie_word_embeddings to false")

    def _is_left_out(self, name: str, family: Family) -> bool:
        if _BUFFERS.search(name) or (name == "lm_head.weight" and self.config.tie_embeddings):
            return True
        later = _MTP.match(name) if family.extra_layers else None
        return later is not None and int(later[1]) >= self.config.layers
