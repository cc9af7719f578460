"""What a comparison of two models found, as a value that can be stored and shown."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Report:
    """Distance of a model from the dense one.

    Attributes:
      max_relative_logit_error: max over unpadded positions and vocabulary of |moe - dense|, over max |dense|.
      valid_loss_dense: cross-entropy of the targets where the loss mask is on, nats per token.
      valid_loss_moe: the same of the other model.
      kl_dense_to_moe: mean over the same tokens of KL(dense || moe), nats.
      tokens: tokens under the loss mask.
      layer_relative_error_L: per layer, the root of sum |moe - dense|^2 over sum |dense|^2 of the residual stream after
        it, over unpadded tokens; None unless asked for.
      load_LE: of a mixture, share of the unpadded tokens that chose each expert; a layer's sum is experts per token.
      border_ties_L: of a mixture of known granularity, unpadded tokens whose k-th and (k+1)-th replica have the same
        router value to the bit, so that the order of the experts decides between them.
      broken_groups_L: of the same, unpadded tokens that took experts of more than k replicas.
    """

    max_relative_logit_error: float
    valid_loss_dense: float
    valid_loss_moe: float
    kl_dense_to_moe: float
    tokens: float
    layer_relative_error_L: list[float] | None = None
    load_LE: list[list[float]] | None = None
    border_ties_L: list[int] | None = None
    broken_groups_L: list[int] | None = None

    @property
    def loss_jump(self) -> float:
        """What the other model's loss is above the dense one's, nats per token."""
        return self.valid_loss_moe - self.valid_loss_dense

    @property
    def load_max_over_mean_L(self) -> list[float] | None:
        """Per layer, the largest expert's load over the mean."""
        return None if self.load_LE is None else [max(load_E) * len(load_E) / sum(load_E) for load_E in self.load_LE]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict; of what is counted per layer, also the sum over layers (of loads: the mean)."""
        values = dataclasses.asdict(self) | {"loss_jump": self.loss_jump}
        if self.load_max_over_mean_L is not None:
            values["load_max_over_mean_L"] = self.load_max_over_mean_L
            values["load_max_over_mean"] = float(np.mean(self.load_max_over_mean_L))
        for name, each in (("border_ties", self.border_ties_L), ("broken_groups", self.broken_groups_L)):
            if each is not None:
                values[name] = sum(each)
        return values

    def table(self) -> str:
        """One line per layer: error, ties, broken groups, load."""
        lines = [f"{'layer':>5s} {'error':>9s} {'ties':>7s} {'broken':>7s} {'load max/mean':>14s}"]
        columns = (self.layer_relative_error_L, self.border_ties_L, self.broken_groups_L, self.load_max_over_mean_L)
        for layer in range(max((len(each) for each in columns if each is not None), default=0)):
            cells = [None if each is None else each[layer] for each in columns]
            formats = zip(cells, ("9.1e", "7d", "7d", "14.2f"))
            texts = ["-".rjust(int(f.split(".")[0].rstrip("d"))) if x is None else format(x, f) for x, f in formats]
            lines.append(" ".join([f"{layer:5d}", *texts]))
        return "\n".join(lines)
