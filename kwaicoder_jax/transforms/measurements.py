"""What one pass over calibration data tells, before it is reduced to scores."""

import dataclasses
import os

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import npz
from kwaicoder_jax.transforms.aggregation import Aggregation, Moments
from kwaicoder_jax.transforms.scores import BAD_FILE, Scores


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Sums over the data, float64; any aggregation can be read from them without a second pass.

    Attributes:
      config: the model.
      moments: of "heads", "groups", "attention_norm", "mlp_norm", "final_norm", and of "neurons" (dense),
        "expert_neurons" or "shared_neurons" (mixtures).
      energy: shares of each norm's energy, summed over tokens.
      influence_L: 1 - cos around each layer, summed over tokens.
      outgoing: norm of what each of the "neurons", "expert_neurons", "shared_neurons" writes to the channels with.
      tokens: unpadded tokens seen.
      sequences: rows seen that had any token.
      blocks_LL: 1 - cos around each run of layers, summed over tokens, if asked for.
      experts_LE: weighted output norms summed over tokens, of a mixture.
    """

    config: models.ModelConfig
    moments: dict[str, Moments]
    energy: dict[str, np.ndarray]
    influence_L: np.ndarray
    outgoing: dict[str, np.ndarray]
    tokens: int
    sequences: int
    blocks_LL: np.ndarray | None = None
    experts_LE: np.ndarray | None = None

    def scores(
        self, batch: str = Aggregation.L2, sequence: str = Aggregation.MEAN, weight_aware: bool = False
    ) -> Scores:
        """Reduces to Scores; see `importance.collect` for the arguments."""
        reduced = {name: m.reduce(batch, sequence, self.sequences) for name, m in self.moments.items()}
        if weight_aware:
            reduced |= {name: reduced[name] * norms for name, norms in self.outgoing.items()}
        return Scores(
            neurons_LF=reduced.get("neurons"),
            heads_LH=reduced["heads"],
            groups_LK=reduced["groups"],
            channels_D=np.sum(reduced["attention_norm"] + reduced["mlp_norm"], axis=0) + reduced["final_norm"],
            layers_L=self.influence_L / self.tokens,
            attention_norm_LD=self.energy["attention_norm"] / self.tokens,
            mlp_norm_LD=self.energy["mlp_norm"] / self.tokens,
            final_norm_D=self.energy["final_norm"] / self.tokens,
            tokens=self.tokens,
            sequences=self.sequences,
            aggregation={"batch": str(batch), "sequence": str(sequence), "weight_aware": weight_aware},
            blocks_LL=None if self.blocks_LL is None else self.blocks_LL / self.tokens,
            experts_LE=self.experts_LE,
            expert_neurons_LEF=reduced.get("expert_neurons"),
            shared_neurons_LS=reduced.get("shared_neurons"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one .npz file, whole or not at all."""
        arrays: dict[str, np.ndarray] = {"influence_L": self.influence_L}
        for unit, moments in self.moments.items():
            for order in ("first", "second"):
                values = getattr(moments, order)
                arrays |= {f"moments/{unit}/{order}/{inner}": array for inner, array in values.items()}
        for group in ("energy", "outgoing"):
            arrays |= {f"{group}/{name}": array for name, array in getattr(self, group).items()}
        for name in ("blocks_LL", "experts_LE"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        npz.write(path, arrays, {"config": self.config.to_dict(), "tokens": self.tokens, "sequences": self.sequences})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Measurements":
        """Reads what `save` wrote; anything else is a UserError that names the file."""
        try:
            arrays, meta = npz.read(path)
            tree = models.unflatten(arrays)
            moments = {unit: Moments(**tree_of_unit) for unit, tree_of_unit in tree.pop("moments").items()}
            return cls(config=models.ModelConfig.from_dict(meta.pop("config")), moments=moments, **tree, **meta)
        except BAD_FILE as error:
            raise UserError(f"not a file of measurements ({error})", where=os.fspath(path)) from error
